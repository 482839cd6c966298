"""Checkpoints: model, optimizer and step, sharded over the ranks that write them, readable by any other number.

A checkpoint is a folder `step-000200` that appears complete or not at all: it is written under another name and
renamed when every rank is done.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import DeviceMesh

from longreel.parallel.comm import all_reduce_sum
from longreel.parallel.engine import Engine

VERSION = 1
_NAME = re.compile(r"step-(\d{6,})")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run's folder `checkpoints/`, oldest first."""
    found = [(int(m[1]), path) for path in folder.glob("step-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of the run in that folder.

    Raises:
        ValueError: neither is there.
    """
    if (path / "run.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        if found := checkpoints(folder):
            return found[-1]
    raise ValueError(f"{path}: no checkpoint there; give a folder step-NNNNNN or the out folder of a training run")


def save_checkpoint(
    folder: Path,
    step: int,
    engine: Engine,
    config: dict[str, Any],
    mesh: DeviceMesh,
) -> Path:
    """Write a checkpoint; every rank calls it.

    Args:
        folder: `checkpoints/` of the run. step: optimizer steps done.
        engine: any, its optimizer attached; names in the file are those of the plain model.
        config: the resolved configuration of the run, for JSON.
        mesh: one axis over all ranks.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it cannot be written.
    """
    final, partial = folder / f"step-{step:06d}", folder / f".step-{step:06d}.partial"
    first = mesh.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait_for_all(mesh)
    state = engine.state()
    try:
        dcp.save(state, checkpoint_id=partial)
    except dcp.api.CheckpointException as error:
        raise OSError(f"{final}: cannot write the checkpoint: {_first(error)}") from error
    if first:
        run = {"version": VERSION, "step": step, "config": config}
        (partial / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    wait_for_all(mesh)
    return final


def read_run(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """(steps done, configuration) of a checkpoint; ValueError if it is not one of this version."""
    path = checkpoint / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        version, step, config = run["version"], run["step"], run["config"]
        if type(step) is not int or step < 0:
            raise ValueError(f"step: expected a count, got {step!r}")
        if not isinstance(config, dict):
            raise ValueError(f"config: expected an object, got {config!r}")
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint}: not a checkpoint, run.json is missing") from error
    except KeyError as error:
        raise ValueError(f"{path}: damaged: {error.args[0]} is missing") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    if version != VERSION:
        raise ValueError(f"{path}: checkpoint version {version}, this version reads {VERSION}")
    return step, config


def load_checkpoint(checkpoint: Path, engine: Engine) -> None:
    """Read a checkpoint into a wrapped model and its optimizer, if one is attached; every rank calls it.

    Raises:
        ValueError: the checkpoint holds another model or is damaged.
    """
    _check_index(checkpoint)
    try:
        state = engine.state()
        dcp.load(state, checkpoint_id=checkpoint)
        engine.load_state(state)
    except (dcp.api.CheckpointException, RuntimeError) as error:
        raise ValueError(f"{checkpoint}: does not fit this model or is damaged: {_first(error)}") from error


def _check_index(checkpoint: Path) -> None:
    """ValueError unless the index of the tensors can be read: reading the tensors would log pages about it."""
    try:
        index = dcp.FileSystemReader(checkpoint).read_metadata()
    except (
        # What unpickling bytes that are no pickle, or not all of one, raises.
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        MemoryError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"{checkpoint / '.metadata'}: missing or damaged: {_first(error)}") from error
    if not isinstance(index, Metadata):
        raise ValueError(f"{checkpoint / '.metadata'}: damaged: holds no index of tensors")


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; one rank calls it."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def wait_for_all(mesh: DeviceMesh) -> None:
    """Return once every rank of the mesh has called it."""
    token = torch.zeros(1, device=mesh.device_type)
    total: Tensor = all_reduce_sum(token, mesh.get_group().group_name)
    total.item()


def _first(error: BaseException) -> str:
    """The reason of the first rank that failed, in one line."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300] or type(error).__name__
