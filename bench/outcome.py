"""Results to records: what a point's workers or the predictor returned, in the schema of reports."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from longreel.bench.cases import Point
from longreel.bench.measure import RankResult
from longreel.bench.provenance import stamped
from longreel.parallel.predict.flops import useful_flops
from longreel.parallel.predict.predict import Prediction
from longreel.reports import formatting
from longreel.reports.records import Record

GiB = 2**30


def measured_record(point: Point, ranks: Sequence[RankResult], provenance: dict[str, Any]) -> Record:
    """The record of a measured point from what its ranks returned."""
    first = ranks[0]
    details = stamped(
        provenance,
        traffic_formula=first.traffic_formula,
        timing=asdict(point.timing),
        worst_gradient=first.verdict.parameter,
    )
    cores = provenance["environment"].get("cores", point.num_devices)
    if point.num_devices > cores:
        details["sharing"] = f"{point.num_devices} ranks share {cores} core{'s' if cores > 1 else ''}"
    outcome: dict[str, Any] = {
        "error": {"loss": first.verdict.loss, "grad": first.verdict.grad, "tolerance": first.verdict.tolerance},
        "traffic": first.traffic,
        "flops": float(point.dp_degree * useful_flops(point.model, num_video=point.seq_len)),
        # The first group holds the gate's long sample.
        "hw_flops": float(point.dp_degree * sum(r.flops for r in ranks[: point.parallel.sp_degree])),
    }
    reasons = [r.reason for r in ranks if r.reason is not None]
    if reasons:
        return point.record("wrong", reason=reasons[0], provenance=details, **outcome)
    fullest = max(ranks, key=lambda r: r.memory["process"] - r.memory.get("process_before", 0))
    return point.record(
        "ok",
        samples_s=first.samples_s,
        step_s=statistics.median(first.samples_s),
        interval_s=(quantile(first.samples_s, 0.2), quantile(first.samples_s, 0.8)),
        memory=fullest.memory,
        provenance=details | {"warm_up": first.warm_up, "memory_source": fullest.memory_source},
        **outcome,
    )


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
        "provenance": stamped(provenance, inputs=inputs),
    }
    if not prediction.fits:
        reason = (
            f"needs {prediction.memory_bytes / GiB:.1f} GiB of {prediction.usable_bytes / GiB:.1f} GiB usable "
            f"({prediction.memory_limit / GiB:.0f} GiB {point.target} less the reserve)"
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


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile of the samples, between neighbours by straight line."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


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
