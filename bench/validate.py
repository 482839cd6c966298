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
from longreel.parallel.predict.calibration import MeasuredRates, calibrate, error_quantiles
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
        inside: whether the recorded time lies in the prediction's interval. calibrated: by measured rates.
    """

    record: Record
    memory: float | None
    time: float
    inside: bool
    calibrated: bool


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


def compare(record: Record, rates: MeasuredRates | None) -> Comparison | str:
    """A step beside its prediction, or why it has none."""
    # An emulated rank computes on the GPU that stands in for its target.
    ran_on = str(record.provenance.get("ran_on", record.device))
    profile = profile_of_device(ran_on)
    if profile is None:
        return f"no profile of {ran_on}"
    if rates is not None and profile_of_device(rates.device) is None:
        rates = None
    target = record.config.get("target")
    if isinstance(target, dict):
        return f"{record.device} is of a file that is not here"
    try:
        model = dict(record.config["model"])
        parallel = ParallelConfig(**record.config["parallel"])
        measured = () if rates is None else rates.providers(DiTConfig(**_tuples(model)).head_dim)
        provider = record.attention if record.attention in measured else "auto"
        case = PredictionCase(
            model=DiTConfig(**_tuples(model)),
            parallel=replace(parallel, attention_provider=provider),
            num_gpus=record.num_devices,
            target=target or profile.name,
            seq_len=record.seq_len,
            batch_per_group=record.batch_per_group,
            rates=rates,
            computes_on=profile.name if record.kind == "emulated" else None,
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
        calibrated=rates is not None,
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
    rates = None
    try:
        rates = calibrate(ops) if ops else None
    except ValueError as error:
        lines.append(str(error))
    if rates is None:
        lines.append("No op record to calibrate on: times are by assumed rates.")
    else:
        lines.append(f"Calibrated on op records of {rates.device}, which no step below had a part in.")
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
