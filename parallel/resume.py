"""Which checkpoint a run goes on from, and whether it may: the same run, only longer or spread in another way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreel.parallel.agreement import check_agreement
from longreel.parallel.checkpoint import checkpoints, newest_whole, read_run
from longreel.parallel.config_json import to_json
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.metrics_log import METRICS
from longreel.parallel.run_config import TrainConfig

# What may differ between a run and its continuation: where things are, how long it goes on, how it is spread.
_FREE = {
    "videos",
    "shards",
    "captions",
    "out",
    "init",
    "preset",
    "resume",
    "steps",
    "checkpoint_every",
    "keep",
    "keep_best",
    "background_save",
    "log_every",
    "tensorboard",
    "timeout_s",
    "profile",
    "profile_steps",
    "plan",
    "target",
    "policy_reason",
    "optimizer.accumulation",
    "optimizer.decay_steps",
    "compression.autoencoder_path",
    "compression.frame_batch",
    "text.text_path",
    "text.text_batch",
}


@dataclass(frozen=True, slots=True)
class Earlier:
    """What a run finds of an earlier one.

    Args:
        checkpoint: to go on from; None for a new run. remarks: what is wrong with newer ones, or that there is none.
        seen: all checkpoints there are.
    """

    checkpoint: Path | None
    remarks: list[str]
    seen: list[Path]


def checkpoint_to_resume(config: TrainConfig, folder: Path, mesh: ParallelMesh) -> Earlier:
    """The checkpoint to go on from; every rank calls it and gets the same.

    Raises:
        ValueError: `out` holds another run, or none to resume, or no undamaged checkpoint; ranks see different ones.
    """
    found = checkpoints(folder)
    _check_same_folder(config, found, mesh)
    if not config.resume:
        if found:
            raise ValueError(
                f"{config.out}: holds a run already ({found[-1].name}); use --resume to go on with it, or another --out"
            )
        return Earlier(None, [], found)
    if not found:
        # A run that was killed before its first checkpoint is begun again; a mistyped folder is not a run.
        if (config.out / METRICS).is_file():
            return Earlier(None, [f"{config.out}: no checkpoint yet; starting from the first step"], found)
        raise ValueError(f"{config.out}: no checkpoint to resume from")
    checkpoint, damages = newest_whole(found, mesh.flat)
    step, _ = read_run(checkpoint)
    if step > config.steps:
        raise ValueError(f"{checkpoint}: has {step} steps already, and steps is {config.steps}")
    return Earlier(checkpoint, damages, found)


def set_aside(resumed: Path, folder: Path) -> None:
    """Rename checkpoints newer than the one to go on from, which are damaged: they count no longer, nothing is lost."""
    found = checkpoints(folder)
    for path in found[found.index(resumed) + 1 :]:
        target, number = path.with_name(f"{path.name}.damaged"), 1
        while target.exists():
            number += 1
            target = path.with_name(f"{path.name}.damaged-{number}")
        path.rename(target)


def check_resumed_clips(checkpoint: Path, digest: str, number: int) -> None:
    """ValueError if a checkpoint was trained on other clips."""
    if read_run(checkpoint)[1].get("clips") != digest:
        raise ValueError(
            f"cannot resume with other videos or captions: {checkpoint} was trained on other clips than the "
            f"{number} given; give the same ones, or another --out to start a new run"
        )


def check_same_encoders(checkpoint: Path, weights: dict[str, str]) -> None:
    """ValueError if a checkpoint was trained on latents or features of other weights, at whatever path they lie."""
    were = read_run(checkpoint)[1].get("encoder_weights")
    for name, digest in weights.items():
        if isinstance(were, dict) and were.get(name) != digest:
            raise ValueError(
                f"cannot resume with other weights of the {name.replace('_', ' ')}: {checkpoint} was trained with "
                f"{were.get(name)}, here are {digest} (digests); give the same ones, or another --out for a new run"
            )


def check_same_run(config: TrainConfig, checkpoint: Path) -> None:
    """ValueError if a checkpoint is of another run than this one, which has what its shards say of their encoders."""
    were, now = (_compared(run) for run in (read_run(checkpoint)[1], to_json(config)))
    for name in now:
        if were.get(name) == now[name]:
            continue
        if name == "decay_steps" and name in were:
            raise ValueError(
                f"cannot resume with another end of the cosine: that of the run in {config.out} is step "
                f"{were[name]}, the command line's {now[name]}; give --decay-steps {were[name]}"
            )
        raise ValueError(
            f"cannot resume with another {name.rpartition('.')[2]}: the run in {config.out} has "
            f"{were.get(name)}, the command line {now[name]}"
        )


def _compared(run: dict[str, Any]) -> dict[str, Any]:
    """What makes a run, by dotted names."""
    flat: dict[str, Any] = {"precision": run.get("parallel", {}).get("precision")}
    optimizer = run.get("optimizer", {})
    if optimizer.get("schedule") == "cosine":
        # As learning_rate() has it: never before warm-up is over.
        end = optimizer.get("decay_steps") or run.get("steps") or 0
        flat["decay_steps"] = max(end, optimizer.get("warmup_steps", 0) + 1)
    for name, value in run.items():
        if name in ("parallel", "clips", "dit", "clip_size"):
            continue
        parts = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: part for key, part in parts.items() if key not in _FREE}
    return flat


def _check_same_folder(config: TrainConfig, found: list[Path], mesh: ParallelMesh) -> None:
    """ValueError if ranks see different checkpoints in `out`."""
    steps = [int(path.name.partition("-")[2]) for path in found]
    try:
        check_agreement("steps of checkpoints", steps, mesh.flat.get_group().group_name, mesh.flat.device_type)
    except ValueError as error:
        raise ValueError(
            f"out: {config.out} is not one folder for all ranks; put it on a file system that all nodes share: {error}"
        ) from error
