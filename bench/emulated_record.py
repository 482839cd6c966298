"""What an emulated rank measured, as a record: times and memory continued to the model's depth where it was not run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from longreel.bench.cases import Point
from longreel.bench.emulated_result import DepthRun, Emulated, Plan, continued, traffic_of
from longreel.bench.provenance import stamped
from longreel.parallel.predict.flops import useful_flops
from longreel.parallel.predict.hardware import get_profile
from longreel.reports.records import Record

METHOD = (
    "one rank ran for real; collectives copied their bytes on the device, with its own data in place of its peers', "
    "and held their streams for the link's time; step times are wall clock with the copies inside that time"
)
_SHARDING = "sharding: the schedule's formula, all but the longest collective of a phase behind its computation"
_MEASURED_WAITS = "sequence: the computing stream stood still, measured by events"


def emulated_record(point: Point, plan: Plan, found: Emulated, provenance: dict[str, Any]) -> Record | None:
    """The record of a point; None where time ran out before there was a figure, so that it is run again."""
    details = stamped(provenance, emulation=_details(point, plan, found))
    outcome: dict[str, Any] = {
        "memory": _memory(point, found.runs),
        "memory_limit": get_profile(point.target or "").memory_bytes,
        "memory_usable": found.cap_bytes,
        "flops": _flops(point),
        "hw_flops": found.hw_flops * point.num_devices,
    }
    if found.wrong is not None:
        return point.record("wrong", reason=found.wrong, provenance=details, **outcome)
    if found.oom is not None:
        return point.record("oom", reason=found.oom, provenance=details, **outcome)
    if found.unfinished is not None:
        return None
    samples, interval = _times(point, found.runs)
    step_s = statistics.median(samples)
    parts = [_parts(run, found.cap_bytes is not None) for run in found.runs]
    breakdown, hidden = (_continued_parts(point, found.runs, [part[i] for part in parts]) for i in (0, 1))
    # The rest of the step is what it computes, whatever the median of its parts.
    breakdown = {"compute": max(0.0, step_s - sum(breakdown.values()))} | breakdown
    peak = get_profile(point.target or "").matmul_flops * point.num_devices * step_s
    energy = [statistics.median(run.energy_j) for run in found.runs if run.energy_j]
    return point.record(
        "ok",
        samples_s=samples,
        step_s=step_s,
        interval_s=interval,
        mfu=outcome["flops"] / peak,
        hfu=outcome["hw_flops"] / peak,
        breakdown=breakdown,
        hidden=hidden,
        traffic={name: round(sent) for name, sent in _traffic(point, found.runs).items()},
        energy_j=_at_depth(point, found.runs, energy) * point.num_devices if len(energy) == len(found.runs) else None,
        telemetry=found.runs[-1].telemetry,
        provenance=details,
        **outcome,
    )


def is_timed(point: Point, runs: Sequence[DepthRun]) -> bool:
    """Whether the model's depth was run often enough that its own times count."""
    return runs[-1].depth == point.model.depth and (len(runs) == 1 or len(runs[-1].samples_s) > 1)


def block_s(point: Point, runs: Sequence[DepthRun]) -> float | None:
    """Seconds of one block, None where the depths run do not say."""
    timed = [run for run in runs if run.samples_s]
    if len(timed) >= 2:
        low, high = timed[0], timed[1]
        return (statistics.median(high.samples_s) - statistics.median(low.samples_s)) / (high.depth - low.depth)
    return statistics.median(timed[0].samples_s) / timed[0].depth if timed else None


def _at_depth(point: Point, runs: Sequence[DepthRun], values: Sequence[float]) -> float:
    """A figure of the model's depth from one per run: that of the depth itself, else the line through the first two."""
    if is_timed(point, runs):
        return values[-1]
    return continued(values[0], values[1], point.model.depth)


def _times(point: Point, runs: Sequence[DepthRun]) -> tuple[tuple[float, ...], tuple[float, float]]:
    """Samples of the model's depth, and their interval: their extremes, or what those of both depths allow.

    Not p20 and p80: of two or three samples these would leave out what was seen.
    """
    if is_timed(point, runs):
        samples = runs[-1].samples_s
        return tuple(samples), (min(samples), max(samples))
    one, two = runs[0].samples_s, runs[1].samples_s
    depth = point.model.depth
    low = continued(min(one), max(min(two) - max(one) + min(one), min(one)), depth)
    high = continued(max(one), max(two) - min(one) + max(one), depth)
    return tuple(continued(a, b, depth) for a, b in zip(one, two, strict=True)), (low, high)


def _memory(point: Point, runs: Sequence[DepthRun]) -> dict[str, int]:
    """Peaks at the model's depth, run or continued from depths 1 and 2; nothing where neither was run."""
    whole = [run for run in runs if run.depth == point.model.depth and run.memory]
    if whole:
        return dict(whole[-1].memory)
    if len(runs) < 2 or not runs[1].memory:
        return {}
    depth = point.model.depth
    return {
        name: round(continued(size, runs[1].memory.get(name, size), depth)) for name, size in runs[0].memory.items()
    }


def _traffic(point: Point, runs: Sequence[DepthRun]) -> dict[str, float]:
    sent = [traffic_of(run) for run in runs]
    names = dict.fromkeys(name for one in sent for name in one)
    return {name: _at_depth(point, runs, [one.get(name, 0) for one in sent]) for name in names}


def _parts(run: DepthRun, on_gpu: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of communication that count and that are hidden, by part, at one depth."""
    link: dict[str, float] = {}
    for name, counts in run.calls.items():
        part = name.partition(".")[0]
        link[part] = link.get(part, 0.0) + counts["link_s"]
    waited = {part: statistics.median(one.get(part, 0.0) for one in run.waited_s) for part in ("sequence", "sharding")}
    if on_gpu:
        # FSDP2's collectives run on streams of its own, whose events the group does not see.
        phases = {name: statistics.median(one[name] for one in run.phases_s) for name in ("forward", "backward")}
        waited["sharding"] = sum(
            min(total, run.longest_link_s) + max(0.0, total - run.longest_link_s - phases[name])
            for name, total in (("forward", run.forward_link_s), ("backward", run.backward_link_s))
        )
    return waited, {part: max(0.0, seconds - waited.get(part, 0.0)) for part, seconds in link.items()}


def _continued_parts(point: Point, runs: Sequence[DepthRun], parts: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: max(0.0, _at_depth(point, runs, [part.get(name, 0.0) for part in parts])) for name in names}


def _details(point: Point, plan: Plan, found: Emulated) -> dict[str, Any]:
    """What stands in the record beside its figures: how it was emulated, and every sample of every depth."""
    timed = bool(found.runs) and is_timed(point, found.runs)
    details: dict[str, Any] = {
        "method": METHOD,
        "rank": plan.rank,
        "ranks": point.num_devices,
        "target": get_profile(point.target or "").label,
        "link": found.link,
        "step_s": "timed at the model's depth" if timed else f"continued from depths 1 and 2 to {point.model.depth}",
        "exposed": f"{_MEASURED_WAITS}; {_SHARDING}",
        "checked": "loss, gradients and parameters are finite; values are those of no real run",
        "warm_up": found.warm_up,
        "memory": found.memory_source,
        "allocator_cap_bytes": found.cap_bytes,
        "depths": {
            str(run.depth): {
                "samples_s": run.samples_s,
                "phases_s": run.phases_s,
                "waited_s": run.waited_s,
                "memory": run.memory,
                "calls": run.calls,
            }
            for run in found.runs
        },
    }
    if len(found.runs) == 3 and found.runs[2].samples_s:
        details["linearity"] = _linearity(found.runs)
    return details


def _linearity(runs: Sequence[DepthRun]) -> dict[str, float]:
    """Time and memory continued from depths 1 and 2, over what the model's depth took."""
    one, two, whole = runs
    medians = [statistics.median(run.samples_s) for run in runs]
    found = {"depth": float(whole.depth), "step_s": continued(medians[0], medians[1], whole.depth) / medians[2]}
    for name, size in whole.memory.items():
        found[name] = continued(one.memory[name], two.memory[name], whole.depth) / size
    return found


def _flops(point: Point) -> float:
    samples = point.dp_degree * point.batch_per_group
    return float(samples * useful_flops(point.model, num_video=point.seq_len))
