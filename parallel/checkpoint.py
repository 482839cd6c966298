"""Checkpoints: the whole state of a run, sharded over the ranks that write it, readable by any other number.

A checkpoint is a folder `step-000200` that appears complete or not at all (longreel.parallel.checkpoint_writer). Its
run.json holds the digest of every file, so that damage is known before anything is trained on it.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh

from longreel.parallel.checkpoint_files import (
    DESCRIPTION,
    IndexReader,
    WeightsOnlyPlanner,
    description_digest,
    file_digests,
    one_line,
)
from longreel.parallel.comm import all_gather_objects, all_reduce_sum

VERSION = 2
_NAME = re.compile(r"step-(\d{6,})")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run's folder `checkpoints/`, oldest first."""
    found = [(int(m[1]), path) for path in folder.glob("step-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def candidates(path: Path) -> list[Path]:
    """The checkpoints that a path means, the one to prefer last: itself, or those of the run in that folder.

    Raises:
        ValueError: there is none.
    """
    if (path / DESCRIPTION).is_file():
        return [path]
    for folder in (path / "checkpoints", path):
        if found := checkpoints(folder):
            return found
    raise ValueError(f"{path}: no checkpoint there; give a folder step-NNNNNN or the out folder of a training run")


def take_checkpoint(path: Path, say: Callable[[str], None], mesh: DeviceMesh | None = None) -> Path:
    """The newest undamaged checkpoint of those that a path means; every rank of the mesh calls it and gets the same.

    Args:
        path: folder of a checkpoint or a run. say: hears of each damaged one that is passed over.
        mesh: one axis over all ranks, which share the reading; None: this process alone.

    Raises:
        ValueError: there is none, or all are damaged.
    """
    taken, damages = newest_whole(candidates(path), mesh)
    for damage in damages:
        say(f"{damage}; taking {taken.name}")
    return taken


def newest_whole(found: list[Path], mesh: DeviceMesh | None) -> tuple[Path, list[str]]:
    """The newest undamaged checkpoint, and what is wrong with each newer one; every rank calls it and gets the same.

    Args:
        found: oldest first, at least one. mesh: as take_checkpoint has it.

    Raises:
        ValueError: all are damaged; says how each is.
    """
    damages: list[str] = []
    for path in reversed(found):
        try:
            if mesh is None:
                check_files(path)
            else:
                check_whole(path, mesh)
        except ValueError as error:
            damages.append(str(error))
        else:
            return path, damages
    raise ValueError("; ".join(damages))


def check_whole(checkpoint: Path, mesh: DeviceMesh) -> None:
    """Read every byte of a checkpoint and compare digests; each rank reads a share of the files.

    Raises:
        ValueError: on every rank: it is damaged or no checkpoint of this version; names the file.
    """
    rank, size, problem = mesh.get_local_rank(), mesh.size(), None
    try:
        check_files(checkpoint, rank, size)
    except ValueError as error:
        problem = str(error)
    everyone = all_gather_objects(problem, mesh.get_group().group_name)
    if said := [problem for problem in everyone if problem is not None]:
        raise ValueError(said[0])


def check_files(checkpoint: Path, rank: int = 0, size: int = 1) -> None:
    """One rank's share of check_whole, or all of it; ValueError names the file that is damaged."""
    files = read_description(checkpoint)["files"]
    for name in sorted(files)[rank::size]:
        try:
            found = file_digests(checkpoint, [name])[name]
        except FileNotFoundError as error:
            raise ValueError(f"{checkpoint / name}: damaged: the file is missing") from error
        except OSError as error:
            raise ValueError(f"{checkpoint / name}: damaged: {error.strerror}") from error
        if found != files[name]:
            raise ValueError(f"{checkpoint / name}: damaged: its bytes are not those that were written")
    IndexReader(checkpoint).read_metadata()


def read_description(checkpoint: Path) -> dict[str, Any]:
    """What run.json says; ValueError if it is damaged or not one of this version."""
    path = checkpoint / DESCRIPTION
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run, dict):
            raise ValueError(f"expected an object, got {run!r}")
        if run["version"] != VERSION:
            raise ValueError(f"checkpoint version {run['version']}, this version reads {VERSION}")
        if run["digest"] != description_digest(run):
            raise ValueError("its text is not what was written")
        kinds = {"step": int, "config": dict, "files": dict}
        for name, kind in kinds.items():
            if type(run[name]) is not kind:
                raise ValueError(f"{name}: expected {kind.__name__}, got {run[name]!r}")
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint}: not a checkpoint, {DESCRIPTION} is missing") from error
    except OSError as error:
        raise ValueError(f"{path}: damaged: {error.strerror}") from error
    except KeyError as error:
        raise ValueError(f"{path}: damaged: {error.args[0]} is missing") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    return run


def read_run(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """(steps done, configuration) of a checkpoint; ValueError if it is damaged or not one of this version."""
    run = read_description(checkpoint)
    return run["step"], run["config"]


def load_checkpoint(checkpoint: Path, state: dict[str, Any]) -> None:
    """Read a checkpoint into a state of any engine and any number of ranks; every rank calls it.

    Args:
        checkpoint: checked before by newest_whole or check_whole. state: of Engine.state(), filled in place.

    Raises:
        ValueError: the checkpoint holds another model or is damaged.
    """
    try:
        dcp.load(state, storage_reader=IndexReader(checkpoint), planner=WeightsOnlyPlanner())
    except (dcp.api.CheckpointException, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{checkpoint}: does not fit this model or is damaged: {one_line(error)}") from error


def has_ema(checkpoint: Path) -> bool:
    """Whether a moving average of the weights is in a checkpoint."""
    return any(name.startswith("ema.") for name in IndexReader(checkpoint).read_metadata().state_dict_metadata)


def read_weights(checkpoint: Path, weights: str) -> dict[str, Tensor]:
    """Whole weights of a checkpoint on the CPU, by the plain model's names, in this process alone.

    Args:
        weights: `model` or `ema`.

    Raises:
        ValueError: there are none of these, or they are damaged.
    """
    index = IndexReader(checkpoint).read_metadata().state_dict_metadata
    prefix = f"{weights}."
    entries = {name: entry for name, entry in index.items() if name.startswith(prefix)}
    if not entries:
        raise ValueError(f"{checkpoint}: holds no {weights} weights; those of `model` are always there")
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    try:
        with warnings.catch_warnings():
            # It says that no other process takes part.
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(state, storage_reader=IndexReader(checkpoint), planner=WeightsOnlyPlanner(), no_dist=True)
    except (dcp.api.CheckpointException, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{checkpoint}: damaged: {one_line(error)}") from error
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def wait_for_all(mesh: DeviceMesh) -> None:
    """Return once every rank of the mesh has called it."""
    token = torch.zeros(1, device=mesh.device_type)
    total: Tensor = all_reduce_sum(token, mesh.get_group().group_name)
    total.item()
