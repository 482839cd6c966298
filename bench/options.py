"""The command line of a sweep, and the sweep that it describes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from longreel.bench.cases import (
    PRESETS,
    MeasuredGrid,
    PredictedGrid,
    Sweep,
    measured_points,
    predicted_points,
    small_dit,
)
from longreel.models.config import PRESETS as MODELS
from longreel.parallel.config import POLICIES, STRATEGIES
from longreel.parallel.predict.hardware import get_profile
from longreel.reports.records import Regime

MODES = ("auto", "measured", "predicted")


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Measure a small DiT on this machine's CPU and predict a large one on GPUs; write a report.

    Lists are separated by commas. What is not given is as the preset says.

    Args:
        preset: `quick` (within three minutes on two cores) or `thorough`.
        mode: `measured`, `predicted`, or `auto` for both.
        out: folder of report.html, records.jsonl and records.csv; out/<preset> if not given.
        seq_lens: lengths in tokens, such as 1k,2k,8192 (k is 1,024), of all points.
        measured_lens, predicted_lens: lengths of these points only. max_len: leave longer measured points out, and go
            on in powers of two up to it.
        strategies: of local, ulysses, fastseq. `local` is the baseline.
        sp_degrees: sequence-parallel degrees.
        ranks: numbers of processes of the measured points.
        depth, hidden_size, num_heads: of the measured DiT.
        model: preset of the predicted DiT. target: GPU. gpus: GPUs of the node.
        policies: activation policies of predicted points: none, full.
        regimes: of predicted points: full, text_only.
        every_policy: predict every policy at every length, not only where it can matter.
        point_timeout: seconds for one point.
    """

    preset: str = "quick"
    mode: str = "auto"
    out: Path | None = None
    seq_lens: str | None = None
    measured_lens: str | None = None
    predicted_lens: str | None = None
    max_len: str | None = None
    strategies: str | None = None
    sp_degrees: str | None = None
    ranks: str | None = None
    depth: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    model: str | None = None
    target: str | None = None
    gpus: int | None = None
    policies: str | None = None
    regimes: str | None = None
    every_policy: bool = False
    point_timeout: float | None = None

    def __post_init__(self) -> None:
        self.resolve()

    @property
    def folder(self) -> Path:
        """Where the sweep writes."""
        return self.out if self.out is not None else Path("out") / self.preset

    def resolve(self) -> Sweep:
        """The sweep; ValueError names the option, its value and what would work."""
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; there are {', '.join(PRESETS)}")
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; there are {', '.join(MODES)}")
        if self.point_timeout is not None and not self.point_timeout > 0:
            raise ValueError(f"point_timeout must be positive, got {self.point_timeout}")
        sweep = PRESETS[self.preset]()
        measured = tuple(self._measured(grid) for grid in sweep.measured)
        regimes = self._names("regimes", self.regimes, get_args(Regime))
        predicted = tuple(self._predicted(g) for g in sweep.predicted if regimes is None or g.regime in regimes)
        sweep = replace(
            sweep,
            measured=measured if self.mode != "predicted" else (),
            predicted=predicted if self.mode != "measured" else (),
        )
        _check_possible(sweep)
        return sweep

    def _measured(self, grid: MeasuredGrid) -> MeasuredGrid:
        lengths = parse_lengths("measured_lens", self.measured_lens) or parse_lengths("seq_lens", self.seq_lens)
        if lengths is None and self.max_len is not None:
            lengths = _up_to(grid.seq_lens, _one_length("max_len", self.max_len))
        model = small_dit(
            depth=self.depth or grid.model.depth,
            hidden_size=self.hidden_size or grid.model.hidden_size,
            num_heads=self.num_heads or grid.model.num_heads,
        )
        given: dict[str, Any] = {
            "seq_lens": lengths,
            "ranks": _counts("ranks", self.ranks),
            "strategies": self._names("strategies", self.strategies, STRATEGIES),
            "sp_degrees": _counts("sp_degrees", self.sp_degrees),
            "point_timeout_s": self.point_timeout,
            "model": model,
            # Lengths that were asked for get every split.
            "max_len_mixed": None if lengths is None else max(lengths),
        }
        return replace(grid, **{name: value for name, value in given.items() if value is not None})

    def _predicted(self, grid: PredictedGrid) -> PredictedGrid:
        if self.model is not None and self.model not in MODELS:
            raise ValueError(f"unknown model {self.model!r}; there are {', '.join(MODELS)}")
        if self.target is not None:
            get_profile(self.target)
        gpus, most = self.gpus or grid.num_gpus, get_profile(self.target or grid.target).gpus_per_node
        if not 1 <= gpus <= most:
            raise ValueError(f"gpus must be 1 to {most}, one node of {self.target or grid.target}, got {gpus}")
        given: dict[str, Any] = {
            "seq_lens": parse_lengths("predicted_lens", self.predicted_lens)
            or parse_lengths("seq_lens", self.seq_lens),
            "strategies": self._names("strategies", self.strategies, STRATEGIES),
            "sp_degrees": _counts("sp_degrees", self.sp_degrees),
            "model": self.model,
            "target": None if self.target is None else get_profile(self.target).name,
            "num_gpus": self.gpus,
            "policies": self._names("policies", self.policies, POLICIES),
            "every_policy": self.every_policy or None,
            "point_timeout_s": self.point_timeout,
        }
        return replace(grid, **{name: value for name, value in given.items() if value is not None})

    def _names(self, option: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...] | None:
        if text is None:
            return None
        names = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
        for name in names:
            if name not in known:
                raise ValueError(f"{option}: unknown {name!r}; there are {', '.join(known)}")
        return names


def parse_lengths(option: str, text: str | None) -> tuple[int, ...] | None:
    """`1k,2048` -> (1024, 2048), ascending; ValueError for what is not a list of lengths; None stays None."""
    if text is None:
        return None
    return tuple(sorted({_one_length(option, word) for word in text.split(",")}))


def _one_length(option: str, word: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*(k?)\s*", word, re.IGNORECASE | re.ASCII)
    tokens = int(match[1]) * (1024 if match[2] else 1) if match else 0
    if tokens < 1:
        raise ValueError(f"{option}: {word.strip()!r} is not a length in tokens; write 2048 or 2k, separated by commas")
    return tokens


def _up_to(seq_lens: tuple[int, ...], longest: int) -> tuple[int, ...]:
    lengths = [n for n in seq_lens if n <= longest]
    while lengths and lengths[-1] * 2 <= longest:
        lengths.append(lengths[-1] * 2)
    return tuple(lengths) or (longest,)


def _counts(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and int(word) > 0):
            raise ValueError(f"{option}: {word!r} is not a positive whole number; write 2,4, separated by commas")
    return tuple(sorted({int(word) for word in words}))


def _check_possible(sweep: Sweep) -> None:
    """ValueError where degrees and ranks leave nothing, or only points that cannot run."""
    for grid in sweep.measured:
        _check_degrees(grid.strategies, grid.sp_degrees, grid.ranks, "ranks")
        _check_any(measured_points(grid, device=""))
    for predicted in sweep.predicted:
        _check_degrees(predicted.strategies, predicted.sp_degrees, (predicted.num_gpus,), "gpus")
        _check_any([point for group in predicted_points(predicted) for point in group])


def _check_degrees(strategies: tuple[str, ...], degrees: tuple[int, ...], worlds: tuple[int, ...], option: str) -> None:
    if all(strategy == "local" for strategy in strategies):
        return
    for degree in degrees:
        if all(world % degree for world in worlds):
            works = sorted({d for world in worlds for d in range(1, world + 1) if world % d == 0})
            raise ValueError(
                f"sp_degrees: {degree} divides none of {option} {', '.join(map(str, worlds))}; degrees that do: "
                f"{', '.join(map(str, works))}"
            )


def _check_any(points: list) -> None:
    split = [point for point in points if point.parallel.strategy != "local"]
    if split and all(point.impossible for point in split):
        raise ValueError(split[0].impossible)
