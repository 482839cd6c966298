"""Results to records: what a point's workers or the predictor returned, in the schema of reports."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from longreel.bench.cases import Point
from longreel.bench.measure import RankResult
from longreel.bench.provenance import stamped
from longreel.bench.reproduce import reproduce
from longreel.parallel.predict.flops import useful_flops
from longreel.parallel.predict.policy import known_gpu
from longreel.parallel.predict.predict import Prediction
from longreel.reports import formatting
from longreel.reports.records import Record
from longreel.reports.turns import compare, quantile

GiB = 2**30


def measured_record(
    point: Point, ranks: Sequence[RankResult], provenance: dict[str, Any], *, baseline: RankResult | None = None
) -> Record:
    """The record of a measured point from what its ranks returned.

    Args:
        point: what ran. ranks: by rank. provenance: of the sweep.
        baseline: a rank's result of the baseline, if the two were timed in turns.
    """
    first = ranks[0]
    details = stamped(
        provenance,
        traffic_formula=first.traffic_formula,
        timing=asdict(point.timing),
        worst_gradient=first.verdict.parameter,
        gate=first.gated,
        reproduce=reproduce(point),
    )
    cores = provenance["environment"].get("cores", point.num_devices)
    if point.device_type == "cpu" and point.num_devices > cores:
        details["sharing"] = f"{point.num_devices} ranks share {cores} core{'s' if cores > 1 else ''}"
    flops = float(point.dp_degree * useful_flops(point.model, num_video=point.seq_len))
    # The first group holds the gate's long sample.
    hw_flops = float(point.dp_degree * sum(r.flops for r in ranks[: point.parallel.sp_degree]))
    outcome: dict[str, Any] = {
        "error": {"loss": first.verdict.loss, "grad": first.verdict.grad, "tolerance": first.verdict.tolerance},
        "traffic": first.traffic,
        "flops": flops,
    }
    reasons = [r.reason for r in ranks if r.reason is not None]
    if reasons:
        return point.record("wrong", reason=reasons[0], provenance=details, **outcome)
    fullest = max(ranks, key=_step_memory)
    energy = [r.energy_j for r in ranks]
    step_s = statistics.median(first.samples_s)
    return point.record(
        "ok",
        samples_s=first.samples_s,
        step_s=step_s,
        interval_s=(quantile(first.samples_s, 0.2), quantile(first.samples_s, 0.8)),
        memory=fullest.memory,
        memory_limit=first.memory_limit,
        energy_j=sum(joules for joules in energy if joules is not None) if None not in energy else None,
        telemetry=first.telemetry if len(ranks) == 1 else _of_ranks(ranks),
        comparison=_comparison(first, baseline, point, shared="sharing" in details),
        hw_flops=hw_flops,
        provenance=details | {"warm_up": first.warm_up, "memory_source": fullest.memory_source},
        **_utilisation(point, flops, hw_flops, step_s),
        **outcome,
    )


def _step_memory(rank: RankResult) -> int:
    memory = rank.memory
    return memory["allocated"] if "allocated" in memory else memory["process"] - memory.get("process_before", 0)


def _of_ranks(ranks: Sequence[RankResult]) -> dict[str, Any]:
    """Telemetry of every rank by `rank <i>`; once, where all say the same."""
    first = ranks[0].telemetry
    if all(rank.telemetry == first for rank in ranks):
        return first
    return {f"rank {i}": rank.telemetry for i, rank in enumerate(ranks)}


def _comparison(candidate: RankResult, baseline: RankResult | None, point: Point, *, shared: bool) -> dict[str, Any]:
    """Verdict from the samples taken in turns, as seconds per token.

    Empty for the baseline itself, without one, and where ranks share cores: time then says who waited for whom.
    """
    if baseline is None or not baseline.samples_s or point.is_baseline or shared:
        return {}
    # Every dp rank adds a sample to a step: the baseline's steps hold more tokens.
    tokens = point.dp_degree / point.num_devices
    # Of the rounds that both were in: a short step is timed on when the baseline has its samples, and what the machine
    # does then is done to one side alone.
    rounds = min(len(candidate.samples_s), len(baseline.samples_s))
    own, other = candidate.samples_s[:rounds], baseline.samples_s[:rounds]
    found = compare([seconds / tokens for seconds in own], other)
    verdict = {"verdict": found.verdict, "ratio": found.ratio, "low": found.low, "high": found.high}
    # Its own: the baseline runs again beside each batch, and its record holds the samples of the first.
    return verdict | {"baseline_samples_s": list(other)}


def _utilisation(point: Point, flops: float, hw_flops: float, step_s: float) -> dict[str, float]:
    """MFU and HFU of a GPU whose peak is known."""
    gpu = known_gpu(point.device, point.num_devices) if point.device_type == "cuda" else None
    if gpu is None:
        return {}
    peak = gpu.matmul_flops * point.num_devices * step_s
    return {"mfu": flops / peak, "hfu": hw_flops / peak}


def predicted_record(point: Point, prediction: Prediction, provenance: dict[str, Any]) -> Record:
    """The record of a predicted point; `oom` where the step does not fit into the target's memory."""
    inputs = {name: _figure(name, value) for name, value in prediction.inputs.items()}
    outcome: dict[str, Any] = {
        "memory": {"allocated": prediction.memory_bytes},
        "memory_limit": prediction.memory_limit,
        "memory_usable": prediction.usable_bytes,
        "traffic": prediction.traffic,
        "flops": prediction.flops,
        "hw_flops": prediction.hw_flops,
        "provenance": stamped(provenance, inputs=inputs, reproduce=reproduce(point)),
    }
    if not prediction.fits:
        reason = (
            f"needs {prediction.memory_bytes / GiB:.1f} GiB of {prediction.usable_bytes / GiB:.1f} GiB usable "
            f"({prediction.memory_limit / GiB:.0f} GiB {point.device} less the reserve)"
        )
        return point.record("oom", reason=reason, **outcome)
    return point.record(
        "ok",
        step_s=prediction.step_s,
        interval_s=prediction.interval_s,
        mfu=prediction.mfu,
        hfu=prediction.hfu,
        breakdown=prediction.breakdown,
        hidden=prediction.hidden,
        **outcome,
    )


def _figure(name: str, value: Any) -> str:
    """One input of the prediction in one line: value, range, where it comes from."""
    if not isinstance(value, dict):
        return str(value)
    figure = value["value"]
    words = f"{figure:.4g}" if isinstance(figure, float) else str(figure)
    if name.endswith("_bytes"):
        words = formatting.in_bytes(figure)
    if "low" in value:
        words += f" ({value['low']:.4g} to {value['high']:.4g})"
    return f"{words}, {value['provenance']}: {value['source']}"
