"""The command line of a sweep, and the sweep that it describes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from longreel.bench.cases import (
    DEFAULT_POLICIES,
    PRESETS,
    MeasuredGrid,
    Point,
    PredictedGrid,
    Sweep,
    measured_points,
    predicted_points,
)
from longreel.models.config import PRESETS as MODELS
from longreel.parallel.config import POLICIES, STRATEGIES
from longreel.parallel.predict.hardware import get_profile
from longreel.reports.records import Regime

MODES = ("auto", "measured", "predicted")
# A process holds some 300 MiB before it computes anything.
MAX_RANKS = 64
DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Measure a small DiT on this machine's CPU and predict a large one on GPUs; write a report.

    Lists are separated by commas. What is not given is as the preset says.

    Args:
        preset: `quick` (within three minutes on two cores), `smoke` (half a minute) or `thorough`.
        mode: `measured`, `predicted`, or `auto` for both.
        out: folder of report.html, records.jsonl and records.csv; out/<preset> if not given.
        seq_lens: lengths in tokens, such as 1k,2k,8192 (k is 1,024), of all points.
        measured_lens: lengths of measured points only.
        predicted_lens: lengths of predicted points only.
        max_len: longest measured length, such as 16k: leaves longer ones out, or goes on to it in powers of two.
            Not beside lengths.
        strategies: some of local (the baseline), ulysses, fastseq, ring, usp (with the largest Ulysses degree that
            leaves a ring and divides the heads).
        sp_degrees: sequence-parallel degrees, such as 2,4.
        ranks: numbers of processes of measured points, such as 1,2,4.
        depth: blocks of the measured DiT.
        hidden_size: width of the measured DiT.
        num_heads: attention heads of the measured DiT.
        model: preset of the predicted DiT, such as dit-xl-2.
        target: GPU that is predicted for, such as H800.
        gpus: GPUs of the predicted node.
        policies: activation policies of predicted points, such as none,full, which are predicted where other points
            than the preset's are asked for.
        regimes: regimes of predicted points: full, text_only.
        every_policy: predict every policy at every length, not only where it can matter.
        point_timeout: seconds that one point may take.
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

    @property
    def folder(self) -> Path:
        """Where the sweep writes, `~` resolved; ValueError for the home folder of a user who has none."""
        out = self.out if self.out is not None else Path("out") / self.preset
        try:
            return out.expanduser()
        except RuntimeError as error:
            raise ValueError(f"out: {out}: {error}") from None

    def resolve(self) -> Sweep:
        """The sweep; ValueError names the option, its value and what would work."""
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; there are {', '.join(PRESETS)}")
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; there are {', '.join(MODES)}")
        if self.point_timeout is not None and not 0 < self.point_timeout <= DAY_S:
            raise ValueError(f"point_timeout must be positive and at most {DAY_S:g} s, got {self.point_timeout}")
        sweep = PRESETS[self.preset]()
        measured = tuple(self._measured(grid) for grid in sweep.measured)
        regimes = self._names("regimes", self.regimes, get_args(Regime))
        has = [grid.regime for grid in sweep.predicted]
        for regime in regimes or ():
            if self.mode != "measured" and regime not in has:
                raise ValueError(f"regimes: preset {self.preset} has no {regime} points; it has {', '.join(has)}")
        predicted = tuple(self._predicted(g) for g in sweep.predicted if regimes is None or g.regime in regimes)
        sweep = replace(
            sweep,
            measured=measured if self.mode != "predicted" else (),
            predicted=predicted if self.mode != "measured" else (),
        )
        _check_possible(
            sweep, asked_ranks=_counts("ranks", self.ranks) or (), asked_degrees=_counts("sp_degrees", self.sp_degrees)
        )
        return sweep

    def _measured(self, grid: MeasuredGrid) -> MeasuredGrid:
        lengths = parse_lengths("measured_lens", self.measured_lens) or parse_lengths("seq_lens", self.seq_lens)
        if self.max_len is not None:
            longest = _one_length("max_len", self.max_len)
            if lengths is not None:
                option = "seq_lens" if self.measured_lens is None else "measured_lens"
                raise ValueError(f"max_len: {self.max_len} says nothing beside {option}; leave one of them out")
            lengths = _up_to(grid.seq_lens, longest)
        ranks = _counts("ranks", self.ranks)
        if ranks is not None and max(ranks) > MAX_RANKS:
            raise ValueError(f"ranks: {max(ranks)} processes are too many for one machine; at most {MAX_RANKS}")
        sizes: dict[str, Any] = {"depth": self.depth, "hidden_size": self.hidden_size, "num_heads": self.num_heads}
        model = replace(grid.model, **{name: size for name, size in sizes.items() if size is not None})
        given: dict[str, Any] = {
            "seq_lens": lengths,
            "ranks": ranks,
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
        gpus = grid.num_gpus if self.gpus is None else self.gpus
        most = get_profile(self.target or grid.target).gpus_per_node
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
            "policies": self._policies(),
            "every_policy": self.every_policy or None,
            "point_timeout_s": self.point_timeout,
        }
        return replace(grid, **{name: value for name, value in given.items() if value is not None})

    def _policies(self) -> tuple[str, ...] | None:
        """As asked for; else the default as soon as points are: a preset's choice is for its own points."""
        points = (self.seq_lens, self.predicted_lens, self.strategies, self.sp_degrees)
        if self.policies is None and any(o is not None for o in (*points, self.model, self.target, self.gpus)):
            return DEFAULT_POLICIES
        return self._names("policies", self.policies, POLICIES)

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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Worlds:
    """Into what a grid may split its devices: `option` sets the worlds, `must_split` are those that have to."""

    option: str
    worlds: tuple[int, ...]
    must_split: tuple[int, ...]
    sp_degrees: tuple[int, ...]
    strategies: tuple[str, ...]
    points: list[Point]


def _check_possible(sweep: Sweep, *, asked_ranks: tuple[int, ...], asked_degrees: tuple[int, ...] | None) -> None:
    """ValueError where degrees and ranks leave nothing to split, or only points that cannot run."""
    found = [
        _Worlds(
            option="ranks",
            worlds=grid.ranks,
            must_split=asked_ranks,
            sp_degrees=grid.sp_degrees,
            strategies=grid.strategies,
            points=measured_points(grid, device=""),
        )
        for grid in sweep.measured
    ] + [
        _Worlds(
            option="gpus",
            worlds=(grid.num_gpus,),
            must_split=(grid.num_gpus,),
            sp_degrees=grid.sp_degrees,
            strategies=grid.strategies,
            points=[point for group in predicted_points(grid) for point in group],
        )
        for grid in sweep.predicted
    ]
    if {name for grid in found for name in grid.strategies} == {"local"}:
        return
    everywhere = [world for grid in found for world in grid.worlds]
    for grid in found:
        for world in grid.must_split:
            if world > 1 and all(world % degree for degree in grid.sp_degrees):
                degrees = ", ".join(map(str, grid.sp_degrees))
                raise ValueError(
                    f"{grid.option}: {world} is not a multiple of any SP degree ({degrees}); sp_degrees that divide "
                    f"it: {_divisors(world)}"
                )
        for degree in asked_degrees or ():
            if all(world % degree for world in everywhere):
                raise ValueError(
                    f"sp_degrees: {degree} divides none of {grid.option} {', '.join(map(str, grid.worlds))}; degrees "
                    f"that do: {_divisors(*grid.worlds)}"
                )
        if not grid.points:
            raise ValueError(
                f"strategies: {', '.join(grid.strategies)} with sp_degrees {', '.join(map(str, grid.sp_degrees))} have "
                f"no point on {grid.option} {', '.join(map(str, grid.worlds))}; give other sp_degrees (usp needs one "
                "with a divisor between 1 and itself that divides the heads), or add local"
            )
        reasons = [point.impossible for point in grid.points if point.parallel.strategy != "local"]
        # Where only some points are impossible, they become rows with their reason.
        if reasons and all(reasons):
            raise ValueError(reasons[0])


def _divisors(*worlds: int) -> str:
    return ", ".join(map(str, sorted({d for world in worlds for d in range(1, world + 1) if world % d == 0})))
