"""In a worker: what is predicted of a point, policy `auto` settled, the longest length that fits searched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from longreel.bench.cases import Point
from longreel.bench.longest import longest_that_fits
from longreel.bench.measure import silence_fsdp
from longreel.parallel.predict.hardware import GiB, GPUProfile, get_profile, profile_of_device
from longreel.parallel.predict.policy import choose_policy, under_policy
from longreel.parallel.predict.predict import Prediction, PredictionCase, predict_step
from longreel.reports.records import Status

# Assumed of policies `auto` and `offload`: half of a node's 2 TiB, shared by its 8 GPUs.
HOST_BYTES = 128 * GiB


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a worker says to a point: the point that it became and its prediction, or status and reason of none.

    chosen: why policy `auto` became the one of the point.
    """

    point: Point
    prediction: Prediction | None = None
    chosen: str | None = None
    status: Status = "ok"
    reason: str | None = None


def predict_share(points: Sequence[Point]) -> Answer:
    """Predict this rank's one of the points."""
    return _alone(_predict, points[dist.get_rank()])


def settle_share(points: Sequence[Point]) -> Answer:
    """This rank's one of the points with policy `auto` settled, not predicted."""
    return _alone(_settle, points[dist.get_rank()])


def search_share(points: Sequence[Point], known: Sequence[dict[int, float]]) -> Answer | None:
    """The longest length that fits this rank's one of the configurations; None where none does.

    known: bytes of device memory by length, of each of them.
    """
    rank = dist.get_rank()
    return _alone(_search, points[rank], known[rank])


def _alone(work: Callable[..., Any], *arguments: Any) -> Any:
    # Prediction needs a process group of its own.
    dist.destroy_process_group()
    silence_fsdp()
    try:
        return work(*arguments)
    finally:
        # The worker takes down the group that it set up.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _predict(point: Point) -> Answer:
    settled = _settle(point)
    if settled.status != "ok":
        return settled
    try:
        case = case_of(settled.point)
    except ValueError as error:
        return replace(settled, point=point, status="skipped", reason=str(error))
    return replace(settled, prediction=predict_step(case))


def _settle(point: Point) -> Answer:
    if point.parallel.policy != "auto":
        return Answer(point=point)
    profile = _profile(point)
    if profile is None:
        reason = f"policy auto goes by a GPU's profile, and there is none of {point.device}; name the policies"
        return Answer(point=point, status="skipped", reason=reason)
    full = replace(point, parallel=under_policy(point.parallel, "full"), target=profile.target)
    try:
        choice = choose_policy(
            point.model,
            point.parallel,
            world_size=point.num_devices,
            grid=case_of(full).grid,
            batch=point.batch_per_group,
            limit_bytes=profile.usable_bytes,
            host_limit_bytes=HOST_BYTES,
            gpu=profile,
        )
    except ValueError as error:
        return Answer(point=point, status="oom" if "none fits" in str(error) else "skipped", reason=str(error))
    parallel = under_policy(point.parallel, choice.policy)
    return Answer(point=replace(point, parallel=parallel), chosen=choice.reason)


def _profile(point: Point) -> GPUProfile | None:
    return profile_of_device(point.device) if point.target is None else get_profile(point.target)


def case_of(point: Point) -> PredictionCase:
    """What to predict of a point; ValueError where nothing can be."""
    assert point.target is not None
    return PredictionCase(
        model=point.model,
        parallel=point.parallel,
        num_gpus=point.num_devices,
        target=point.target,
        seq_len=point.seq_len,
        batch_per_group=point.batch_per_group,
    )


def _search(point: Point, known: dict[int, float]) -> Answer | None:
    assert point.target is not None

    usable = get_profile(point.target).usable_bytes

    def need(seq_len: int) -> float:
        found = predict_step(case_of(replace(point, seq_len=seq_len)))
        return max(found.memory_bytes / usable, found.host_bytes / HOST_BYTES)

    # Of host memory nothing is known yet.
    known = {} if point.parallel.policy == "offload" else {n: memory / usable for n, memory in known.items()}
    longest = longest_that_fits(need, 1.0, known=known)
    return None if longest is None else _predict(replace(point, seq_len=longest))
