"""A model's weights in one safetensors file, with what it takes to build and use the model: out of a run and back.

Pickles are read by weights-only loading, which runs no code, or refused.
"""

from __future__ import annotations

import errno
import json
import pickle
import re
import warnings
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longreel.models.dit import DiT
from longreel.models.publish import publish_tensors

_METADATA = "longreel"
_NO_WEIGHTS = "damaged or cut off, or no file that torch.save wrote"
# What decides what a model's input and output mean, by where it stands in a run's configuration.
_MEANING = (
    ("objective", "objective"),
    ("objective", "prediction"),
    ("compression", "autoencoder"),
    ("text", "text_encoder"),
)


def write_weights(path: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write weights and a run's configuration as one safetensors file; it appears complete or not at all.

    Args:
        path: the file. weights: by the plain model's names. config: of the run, as checkpoints hold it.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_tensors(path, tensors, {_METADATA: json.dumps(config)})


def read_weights_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, configuration) of a file that write_weights wrote.

    Raises:
        ValueError: it is damaged or another safetensors file. OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or no safetensors file: {error}") from error
    if text is None:
        raise ValueError(f"{path}: a safetensors file of something else; parallel/export.py writes ours")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: damaged: its configuration is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: damaged: its configuration is no object")
    return weights, config


def read_pickled_weights(path: Path) -> dict[str, Tensor]:
    """A state dict in a .pt file, by weights-only loading; its entry "ema" or "model" if it is a training checkpoint.

    Raises:
        ValueError: the file asks for more than weights, is damaged, or holds something else.
    """
    try:
        with warnings.catch_warnings():
            # Of a pickle that torch.save did not write; what is wrong with it is said below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path}: refused: weights-only loading does not accept it, and anything else may run code (it asks "
                f"for {asked[1]})"
            ) from error
        raise ValueError(f"{path}: {_NO_WEIGHTS}") from error
    except RuntimeError as error:
        raise ValueError(f"{path}: {_NO_WEIGHTS}: {_said_by_torch(error)}") from error
    except (EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        # What the unpickler stumbled over in bytes that are no pickle, which says nothing of the file.
        raise ValueError(f"{path}: {_NO_WEIGHTS}") from error
    except OSError as error:
        # Of a cut-off archive: a seek to before its start. Where the file cannot be opened, the error names it.
        if error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path}: {_NO_WEIGHTS}") from error
    for entry in ("ema", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(entry), dict):
            loaded = loaded[entry]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path}: holds no state dict of tensors")
    return loaded


def _said_by_torch(error: RuntimeError) -> str:
    """What an error says of the file, without where in PyTorch it was found and what PyTorch thinks of itself."""
    said = re.sub(r"^\[enforce fail at \S+\] \. ", "", " ".join(str(error).split()))
    return shorten(re.split(r"\.? This is an internal", said)[0], 200, placeholder=" ...")


def load_initial_weights(path: Path, model: DiT, config: dict[str, Any]) -> None:
    """Start a model from the weights of a file.

    Args:
        path: of the file. model: to fill. config: of the run, as checkpoints hold it.

    Raises:
        ValueError: the path is a folder; or they are of another model, or what they say means something else: another
            objective or prediction, latents of another autoencoder, features of another text encoder, positions of
            another size.
    """
    if path.is_dir():
        raise ValueError(
            f"init: {path} is a folder; give a .safetensors file that parallel/export.py wrote, as `python "
            f"parallel/export.py --checkpoint {path} --out weights.safetensors` does of a run"
        )
    weights, trained = read_weights_file(path)
    pairs = {name: [run.get(part, {}).get(name) for run in (trained, config)] for part, name in _MEANING}
    pairs["position_gain"] = [trained.get("dit", {}).get("position_gain", 1.0), model.config.position_gain]
    for name, (there, now) in pairs.items():
        if there != now:
            raise ValueError(
                f"init: {path} was trained with {name} {there}, this run has {now}; give --{name.replace('_', '-')} "
                f"{there}, or start without --init"
            )
    check_fits(path, weights, model)
    model.load_state_dict(weights)


def check_fits(path: Path, weights: dict[str, Tensor], model: DiT) -> None:
    """ValueError unless weights have the names and shapes of a model's."""
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        name = wrong[0]
        raise ValueError(
            f"{path}: weights of another model: {name} is {found.get(name, 'missing')}, expected "
            f"{expected.get(name, 'not there')} ({len(wrong)} of {len(expected)} differ)"
        )
