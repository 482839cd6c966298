"""Predictions against every measured or emulated step there is: `python bench/validate.py`.

Rates are calibrated on op records alone; no step that is compared had a part in them.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longreel.data.command_line import parse_arguments
from longreel.models.config import DiTConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.predict.calibration import MeasuredRates, calibrate_each, cpu_of, error_quantiles
from longreel.parallel.predict.hardware import profile_of_device
from longreel.parallel.predict.predict import PredictionCase, predict_step
from longreel.reports.op_records import OpRecord
from longreel.reports.records import Record
from longreel.reports.sources import holds_ops, load_ops, load_steps
from longreel.reports.store import latest


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateConfig:
    """Compare predictions with measured and emulated steps.

    Args:
        records: folder of record files, of steps to compare with and of ops to calibrate on, or one such file.
    """

    records: Path = Path("reports/measured")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One step beside its prediction; errors are predicted over recorded, less 1.

    Args:
        record: the step. memory: relative error of allocated bytes, None where the record has none. time: of seconds.
        inside: whether the recorded time lies in the prediction's interval.
    """

    record: Record
    memory: float | None
    time: float
    inside: bool


def read(source: Path) -> tuple[list[Record], list[OpRecord]]:
    """Measured and emulated steps that are right, and op records, of every record file under a folder.

    Of records with one key the last counts.

    Raises:
        ValueError: a file is no record file. OSError: one cannot be read.
    """
    steps: list[Record] = []
    ops: list[OpRecord] = []
    for file in sorted(source.rglob("*.jsonl*")) if source.is_dir() else [source]:
        if holds_ops(file):
            ops += load_ops(file)[0]
        else:
            steps += load_steps(file)[0]
    steps = latest(steps)
    return [s for s in steps if s.kind in ("measured", "emulated") and s.status == "ok"], latest(ops)


def rates_for(record: Record, rates: Sequence[MeasuredRates]) -> MeasuredRates | None:
    """Those of the device that a step ran on; of another GPU, to be scaled, where that one was not measured."""
    cpu = cpu_of(record)
    if cpu is not None:
        return next((one for one in rates if one.cpu == cpu), None)
    profile = profile_of_device(ran_on(record))
    of_gpus = [(one, gpu) for one in rates if (gpu := profile_of_device(one.device)) is not None]
    return next((one for one, gpu in of_gpus if gpu is profile), of_gpus[0][0] if of_gpus else None)


def ran_on(record: Record) -> str:
    """The device that computed: of an emulated step the GPU that stood in for its target."""
    return str(record.provenance.get("ran_on", record.device))


def compare(record: Record, rates: Sequence[MeasuredRates]) -> Comparison | str:
    """A step beside its prediction, or why it has none.

    Args:
        record: the step. rates: of every device that ops were measured on.
    """
    own = rates_for(record, rates)
    on_cpu = cpu_of(record) is not None
    profile = profile_of_device(ran_on(record))
    if on_cpu and own is None:
        return f"no op records of {record.device} ({cpu_of(record)})"
    if not on_cpu and profile is None:
        return f"no profile of {ran_on(record)}"
    target = record.config.get("target")
    if isinstance(target, dict):
        return f"{record.device} is of a file that is not here"
    try:
        model = DiTConfig(**_tuples(dict(record.config["model"])))
        measured = () if own is None else own.providers(model.head_dim)
        provider = record.attention if on_cpu or record.attention in measured else "auto"
        parallel = ParallelConfig(**record.config["parallel"])
        case = PredictionCase(
            model=model,
            parallel=replace(parallel, attention_provider=provider),
            num_gpus=record.num_devices,
            target=own.device if on_cpu and own is not None else str(target or (profile and profile.name)),
            seq_len=record.seq_len,
            batch_per_group=record.batch_per_group,
            # A CPU runs the specification of what is one kernel on a GPU.
            fused_pointwise=not on_cpu,
            rates=own,
            computes_on=profile.name if profile is not None and record.kind == "emulated" else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        return f"cannot be predicted: {error}"
    found = predict_step(case)
    assert record.step_s is not None
    allocated = record.memory.get("allocated")
    return Comparison(
        record=record,
        memory=None if not allocated else found.memory_bytes / allocated - 1,
        time=found.step_s / record.step_s - 1,
        inside=found.interval_s[0] <= record.step_s <= found.interval_s[1],
    )


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def summary(compared: Sequence[Comparison]) -> Iterable[str]:
    """The distribution of errors in lines: all of a kind, then by regime, strategy and policy."""
    groups: defaultdict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for one in compared:
        r = one.record
        for part in ("all", r.regime, r.strategy, f"policy {r.policy}"):
            groups[r.kind, part].append(one)
    yield f"{'':32} {'steps':>6}   memory: median, 90 %, largest   time: median, 90 %, largest   in interval"
    for (kind, part), ones in groups.items():
        memory = [one.memory for one in ones if one.memory is not None]
        words = [f"{kind}, {part}".ljust(32), f"{len(ones):>6}", "  "]
        words.append(_percent(memory).ljust(30) if memory else "not recorded".ljust(30))
        words.append(_percent([one.time for one in ones]).ljust(29))
        words.append(f"{sum(one.inside for one in ones)} of {len(ones)}")
        yield " ".join(words)


def _percent(errors: Sequence[float]) -> str:
    return ", ".join(f"{100 * error:.1f} %" for error in error_quantiles(errors))


def run(config: ValidateConfig) -> list[str]:
    """The lines to print.

    Raises:
        ValueError, OSError: what is there cannot be read.
    """
    steps, ops = read(config.records) if config.records.exists() else ([], [])
    lines = []
    rates = calibrate_each(ops)
    for own in rates:
        lines.append(f"Calibrated on op records of {own.device} ({own.dtype}), which no step below had a part in.")
    if not any(profile_of_device(own.device) for own in rates):
        lines.append("No op record of a GPU to calibrate on: times on GPUs are by assumed rates.")
    if not steps:
        return [*lines, f"No measured or emulated step in {config.records}: nothing is validated yet."]
    found = [compare(step, rates) for step in steps]
    compared = [one for one in found if isinstance(one, Comparison)]
    if compared:
        lines += summary(compared)
    left_out: defaultdict[str, int] = defaultdict(int)
    for one in found:
        if isinstance(one, str):
            left_out[one] += 1
    return [*lines, *(f"{count} steps left out: {reason}" for reason, count in left_out.items())]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 after one `error:` line on stderr."""
    try:
        config = parse_arguments(
            ValidateConfig, sys.argv[1:] if arguments is None else arguments, prog="python bench/validate.py"
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
            lines = run(config)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
