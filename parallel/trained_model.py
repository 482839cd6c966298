"""What training left: a checkpoint or a weights file, with all it takes to build the model again and use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from longreel.models.autoencoders import AutoencoderConfig
from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.models.objective import ObjectiveConfig
from longreel.models.text import TextEncoderConfig
from longreel.parallel.checkpoint import has_ema, load_checkpoint, read_run, take_checkpoint
from longreel.parallel.config_json import clip_size_from_json, from_json
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.parallelize import ParallelDiT
from longreel.parallel.weights_file import check_fits, read_weights_file


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """A trained model, not built yet.

    Args:
        path: of the checkpoint or file that is taken.
        dit, objective, compression, text: what it was trained as.
        clip_size: num_frames, height and width of its training clips, in pixels.
        guided_channels: that its guidance steers; None: all.
        encoder_weights: digests of the encoders' weights in training; empty where they are not known.
    """

    path: Path
    dit: DiTConfig
    objective: ObjectiveConfig
    compression: AutoencoderConfig
    text: TextEncoderConfig
    clip_size: dict[str, int]
    guided_channels: int | None
    encoder_weights: dict[str, str]
    # Of a weights file.
    tensors: dict[str, Tensor] | None

    def build(self, make: Callable[[DiT], ParallelDiT], weights: str) -> ParallelDiT:
        """The model with its weights, spread over ranks; every rank calls it.

        Args:
            make: spreads a plain model. weights: `model`, `ema`, or `auto`, which prefers the average. A weights file
                holds one kind, and it is taken.

        Raises:
            ValueError: there are no such weights, or they are damaged or do not fit.
        """
        plain = DiT(self.dit)
        if self.tensors is not None:
            check_fits(self.path, self.tensors, plain)
            plain.load_state_dict(self.tensors)
            return make(plain)
        averaged = has_ema(self.path)
        if weights == "ema" and not averaged:
            raise ValueError(f"{self.path}: holds no moving average of weights; use --weights model")
        entry = "ema" if averaged and weights != "model" else "model"
        model = make(plain)
        state = {entry: get_model_state_dict(model.module)}
        load_checkpoint(self.path, state)
        set_model_state_dict(model.module, state[entry])
        return model


def open_trained(
    path: Path,
    mesh: ParallelMesh,
    say: Callable[[str], None],
    *,
    autoencoder_path: str | None = None,
    text_path: str | None = None,
) -> TrainedModel:
    """Find what a path means, and check it; every rank calls it.

    Args:
        path: folder of a checkpoint or a run, or a safetensors file. say: hears of damaged checkpoints passed over.
        autoencoder_path, text_path: where encoders lie now, if not where they were.

    Raises:
        ValueError: nothing is there, or it is damaged.
    """
    if path.suffix == ".safetensors":
        tensors, trained = read_weights_file(path)
        taken = described = path
    else:
        tensors = None
        taken = take_checkpoint(path, say, mesh.flat)
        trained, described = read_run(taken)[1], taken / "run.json"
    try:
        compression = _from(AutoencoderConfig, trained, "compression", autoencoder_path=autoencoder_path)
        text = _from(TextEncoderConfig, trained, "text", text_path=text_path)
        guided = trained.get("guided_channels")
        if guided is not None and type(guided) is not int:
            raise ValueError(f"guided_channels: expected a whole number, got {guided!r}")
        return TrainedModel(
            path=taken,
            dit=from_json(DiTConfig, trained, "dit"),
            objective=from_json(ObjectiveConfig, trained, "objective"),
            compression=compression,
            text=text,
            clip_size=clip_size_from_json(trained.get("clip_size")),
            guided_channels=guided,
            encoder_weights=dict(trained.get("encoder_weights") or {}),
            tensors=tensors,
        )
    except ValueError as error:
        raise ValueError(f"{described}: {error}") from error


def _from(kind: type[Any], trained: dict[str, Any], name: str, **moved: str | None) -> Any:
    """A configuration with what is given now in the place of what was."""
    return replace(from_json(kind, trained, name), **{key: value for key, value in moved.items() if value is not None})
