"""The command line of a sweep, and the sweep that it describes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

from tyro.conf import arg

from longreel.bench.cases import Timing
from longreel.bench.grids import DEFAULT_POLICIES, Axes, MeasuredGrid, TargetGrid
from longreel.bench.modes import Machine, for_machine, this_machine
from longreel.bench.option_values import one_length, parse_counts, parse_lengths, parse_names, up_to
from longreel.bench.peers import PEERS
from longreel.bench.possible import check_possible
from longreel.bench.presets import PRESETS, Sweep
from longreel.kernels.attention import PROVIDERS
from longreel.models.config import PRESETS as MODELS
from longreel.models.config import Conditioning, CrossLayout
from longreel.parallel.config import ENGINES, POLICIES, STRATEGIES
from longreel.parallel.predict.hardware import get_profile
from longreel.reports.records import Regime

MODES = ("auto", "measured", "emulated", "predicted")
# A process holds some 300 MiB before it computes anything.
MAX_RANKS = 64
DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Measure, emulate and predict training steps over strategies, lengths and policies; write a report.

    Lists are separated by commas. What is not given is as the preset says. docs/sweep.md has examples.

    Args:
        preset: `quick` (within three minutes on two cores), `smoke` (half a minute), `thorough`, `blog` (the two
            published tables), `h800` (8 GPUs, all there is), `compare` (other projects' sequence parallelism),
            `headline` (one emulated rank of eight: baseline and our best) or `point` (what the options say, and nothing
            else).
        mode: `measured`, `emulated`, `predicted`, or `auto`: what this machine can do; of `quick`, `smoke` and
            `thorough` CPU processes and predictions, unless `gpus` says that GPUs are meant.
        rehearse: emulate on the CPU, tiny models and lengths in place of the true ones: every path, no meaning.
        minutes: time for what is emulated; the same command goes on with what it was too short for.
        out: folder of report.html, records.jsonl and records.csv; out/<preset> if not given.
        commit: the commit of this tree, for a copy that is no git checkout; of records made on a GPU.
        resume: keep the points that are in the folder from this code on this machine; run the others and failed ones.
        seq_lens: lengths in tokens, such as 1k,2k,8192 (k is 1,024), of all points.
        measured_lens: lengths of points measured on this machine's CPU only.
        predicted_lens: lengths of points of true size only.
        max_len: longest length measured on the CPU, such as 16k: leaves longer ones out, or goes on to it in powers of
            two. Not beside lengths.
        strategies: some of local (data parallelism alone), ulysses, fastseq, ring, usp (with the largest Ulysses degree
            that leaves a ring and divides the heads), or none (peers and the baseline only).
        sp_degrees: sequence-parallel degrees, such as 2,4.
        ranks: numbers of processes of points measured on the CPU, such as 1,2,4.
        depth: blocks of the DiT measured on the CPU.
        hidden_size: width of the DiT measured on the CPU.
        num_heads: attention heads of the DiT measured on the CPU.
        model: preset of the DiT of true size, such as dit-xl-2.
        target: GPU that is predicted or emulated, such as h800; or a TOML file with a profile, or file.toml:NAME.
        gpus: GPUs of the node; leaves out what is measured on the CPU, unless `ranks` asks for it.
        policies: activation policies, such as none,full; auto: the fastest that fits by prediction. Where other points
            of true size than the preset's are asked for, none,keep_attention,full if not given.
        regimes: regimes of points of true size: full, text_only.
        layouts: of the text's cross attention: replicated, published; of text_only published if not given.
        conditioning: how text conditions the model: cross, adaln, in_context.
        engines: sharding engines: fsdp2-zero2, fsdp2-zero3, ddp, colossalai.
        attentions: attention providers, such as sdpa-flash,triton.
        batches: samples of one sequence-parallel group, such as 1,2; 1 where measured.
        head_chunks: of ulysses and usp, parts that heads are exchanged in, such as 1,2,4.
        mlp_tiles: tokens that the MLP takes at a time, such as 4k.
        peers: other projects' sequence parallelism: deepspeed-ulysses, yunchang-usp.
        every_policy: run every policy at every length, not only where it can matter.
        search: also find the longest length that fits each configuration.
        baseline: the baseline is there, whatever else is asked for.
        min_samples: steps timed at least.
        max_samples: steps timed at most.
        wall_cap: seconds of one point's steps after which sampling ends with what there is, at least two.
        point_timeout: seconds that one point may take.
    """

    preset: str = "quick"
    mode: str = "auto"
    rehearse: bool = False
    minutes: float | None = None
    out: Path | None = None
    commit: str | None = None
    resume: bool = False
    seq_lens: str | None = None
    measured_lens: str | None = None
    predicted_lens: str | None = None
    max_len: str | None = None
    strategies: Annotated[str | None, arg(aliases=["--strategy"])] = None
    sp_degrees: Annotated[str | None, arg(aliases=["--sp-degree"])] = None
    ranks: str | None = None
    depth: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    model: str | None = None
    target: str | None = None
    gpus: int | None = None
    policies: Annotated[str | None, arg(aliases=["--policy"])] = None
    regimes: Annotated[str | None, arg(aliases=["--regime"])] = None
    layouts: Annotated[str | None, arg(aliases=["--layout"])] = None
    conditioning: str | None = None
    engines: Annotated[str | None, arg(aliases=["--engine"])] = None
    attentions: Annotated[str | None, arg(aliases=["--attention"])] = None
    batches: Annotated[str | None, arg(aliases=["--batch"])] = None
    head_chunks: str | None = None
    mlp_tiles: Annotated[str | None, arg(aliases=["--mlp-tile"])] = None
    peers: str | None = None
    every_policy: bool = False
    search: bool | None = None
    baseline: bool = True
    min_samples: int | None = None
    max_samples: int | None = None
    wall_cap: float | None = None
    point_timeout: float | None = None

    @property
    def folder(self) -> Path:
        """Where the sweep writes, `~` resolved; ValueError for the home folder of a user who has none."""
        out = self.out if self.out is not None else Path("out") / self.preset
        try:
            return out.expanduser()
        except RuntimeError as error:
            raise ValueError(f"out: {out}: {error}") from None

    def resolve(self, machine: Machine | None = None) -> Sweep:
        """The sweep on a machine, this one if not given; ValueError names the option, its value and what would work."""
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; there are {', '.join(PRESETS)}")
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; there are {', '.join(MODES)}")
        for name, seconds in (("point_timeout", self.point_timeout), ("wall_cap", self.wall_cap)):
            if seconds is not None and not 0 < seconds <= DAY_S:
                raise ValueError(f"{name} must be positive and at most {DAY_S:g} s, got {seconds}")
        if self.minutes is not None and not 0 < self.minutes <= DAY_S / 60:
            raise ValueError(f"minutes must be positive and at most {DAY_S / 60:g}, got {self.minutes}")
        if self.rehearse and self.mode not in ("auto", "emulated"):
            raise ValueError(f"rehearse is a rehearsal of mode emulated, got mode {self.mode!r}; leave --mode out")
        machine = machine or this_machine()
        sweep = PRESETS[self.preset]()
        self._check_conditioning(sweep, machine)
        if self.minutes is not None:
            sweep = replace(sweep, minutes=self.minutes)
        targets = tuple(
            dict.fromkeys(
                grid
                for named in self._of_regimes(sweep.targets)
                for grid in self._layouts(self._target(named, on_gpus=self.mode == "measured"))
            )
        )
        sweep = replace(
            sweep,
            measured=self._variants(tuple(self._measured(grid) for grid in sweep.measured)),
            rehearsal=self._rehearsal(tuple(self._measured(grid) for grid in sweep.rehearsal)),
            targets=targets,
        )
        if self.rehearse:
            machine = Machine(num_gpus=1, gpu_name="a rehearsal's")
        sweep = for_machine(
            sweep,
            "emulated" if self.rehearse else self.mode,
            machine,
            wants_gpus=self.gpus is not None,
            wants_cpu=self.ranks is not None,
            timing=self._timing(Timing()),
        )
        if self.rehearse:
            # No prediction belongs to a rehearsal.
            sweep = replace(sweep, targets=tuple(grid for grid in sweep.targets if grid.kind == "emulated"))
        if self.search and not any(grid.search for grid in sweep.targets):
            raise ValueError(
                "search: True is predicted, which nothing is here; leave out search, or --rehearse and --mode measured"
            )
        if self.search and parse_names("policies", self.policies, (*POLICIES, "auto")) == ("auto",):
            raise ValueError(f"search: takes policies by name, not auto; give --policies {','.join(POLICIES)}")
        check_possible(
            sweep,
            asked_ranks=parse_counts("ranks", self.ranks) or (),
            asked_degrees=parse_counts("sp_degrees", self.sp_degrees),
        )
        return sweep

    def _of_regimes(self, grids: tuple[TargetGrid, ...]) -> tuple[TargetGrid, ...]:
        regimes = parse_names("regimes", self.regimes, get_args(Regime))
        if regimes is None:
            return grids
        has = list(dict.fromkeys(grid.regime for grid in grids))
        small = self.mode == "measured" and not any(PRESETS[self.preset]().rehearsal)
        for regime in regimes:
            if regime not in has and not small:
                raise ValueError(f"regimes: preset {self.preset} has no {regime} points; it has {', '.join(has)}")
        return tuple(grid for grid in grids if grid.regime in regimes)

    def _layouts(self, grid: TargetGrid) -> tuple[TargetGrid, ...]:
        layouts = parse_names("layouts", self.layouts, get_args(CrossLayout))
        if layouts is None:
            return (grid,)
        given: list[dict[str, Any]] = [{"layout": layout} for layout in layouts]
        return tuple(replace(grid, **one) for one in given)

    def _variants(self, grids: tuple[MeasuredGrid, ...]) -> tuple[MeasuredGrid, ...]:
        """Small grids in the regimes and layouts that were asked for, where they are all that is."""
        if self.preset != "point" and self.mode != "measured":
            return grids
        regimes = parse_names("regimes", self.regimes, get_args(Regime))
        models: list[dict[str, Any]] = [{"text_only": regime == "text_only"} for regime in regimes or ()] or [{}]
        layouts = parse_names("layouts", self.layouts, get_args(CrossLayout))
        models = [one | {"cross_layout": layout} for one in models for layout in layouts or ()] or models
        return tuple(replace(grid, model=replace(grid.model, **one)) for grid in grids for one in models)

    def _rehearsal(self, grids: tuple[MeasuredGrid, ...]) -> tuple[MeasuredGrid, ...]:
        """What stands in for points of true size: of the same regimes and layouts."""
        regimes = parse_names("regimes", self.regimes, get_args(Regime)) or get_args(Regime)
        layouts = parse_names("layouts", self.layouts, get_args(CrossLayout))
        models: list[dict[str, Any]] = [{"cross_layout": layout} for layout in layouts or ()] or [{}]
        found = [grid for grid in grids if ("text_only" if grid.model.text_only else "full") in regimes]
        return tuple(dict.fromkeys(replace(grid, model=replace(grid.model, **one)) for grid in found for one in models))

    def _axes(self, grid: Axes) -> dict[str, Any]:
        """What the options say of the axes that every grid has; None for those they do not mention."""
        strategies = parse_names("strategies", self.strategies, (*STRATEGIES, "none"))
        return {
            "strategies": strategies if strategies != ("none",) else (),
            "sp_degrees": parse_counts("sp_degrees", self.sp_degrees),
            "policies": parse_names("policies", self.policies, (*POLICIES, "auto")),
            "engines": parse_names("engines", self.engines, ENGINES),
            "attentions": parse_names("attentions", self.attentions, ("auto", *PROVIDERS)),
            "batches": parse_counts("batches", self.batches),
            "head_chunks": parse_counts("head_chunks", self.head_chunks),
            "mlp_tiles": parse_lengths("mlp_tiles", self.mlp_tiles),
            "peers": parse_names("peers", self.peers, tuple(PEERS)),
            "baseline": None if self.baseline else False,
            "point_timeout_s": self.point_timeout,
        }

    def _timing(self, timing: Timing) -> Timing:
        given = {"min_samples": self.min_samples, "max_samples": self.max_samples, "wall_cap_s": self.wall_cap}
        if self.min_samples is not None and self.max_samples is None:
            given["max_samples"] = max(timing.max_samples, self.min_samples)
        return replace(timing, **_said(given))

    def _measured(self, grid: MeasuredGrid) -> MeasuredGrid:
        lengths = parse_lengths("measured_lens", self.measured_lens) or parse_lengths("seq_lens", self.seq_lens)
        if self.max_len is not None:
            longest = one_length("max_len", self.max_len)
            if lengths is not None:
                option = "seq_lens" if self.measured_lens is None else "measured_lens"
                raise ValueError(f"max_len: {self.max_len} says nothing beside {option}; leave one of them out")
            lengths = up_to(grid.seq_lens, longest)
        ranks = parse_counts("ranks", self.ranks)
        if ranks is not None and max(ranks) > MAX_RANKS:
            raise ValueError(f"ranks: {max(ranks)} processes are too many for one machine; at most {MAX_RANKS}")
        model: dict[str, Any] = {"depth": self.depth, "hidden_size": self.hidden_size, "num_heads": self.num_heads}
        model["conditioning"] = self._conditioning()
        given = self._axes(grid) | {
            "seq_lens": lengths,
            "ranks": ranks,
            "model": replace(grid.model, **_said(model)),
            "timing": self._timing(grid.timing),
            "longest_timing": self._timing(grid.longest_timing),
            # Lengths that were asked for get every split.
            "max_len_mixed": None if lengths is None else max(lengths),
        }
        return replace(grid, **_said(given))

    def _conditioning(self) -> str | None:
        names = parse_names("conditioning", self.conditioning, get_args(Conditioning))
        if names is not None and len(names) > 1:
            raise ValueError(f"conditioning: one of {', '.join(get_args(Conditioning))}, got {self.conditioning}")
        return None if names is None else names[0]

    def _check_conditioning(self, sweep: Sweep, machine: Machine) -> None:
        name = self._conditioning()
        regimes = parse_names("regimes", self.regimes, get_args(Regime))
        if regimes is None:
            # Where a CPU measures a preset's own small grids, those of true size play no part.
            small = self.mode == "measured" and machine.num_gpus == 0 and not sweep.rehearsal
            regimes = () if small else tuple(grid.regime for grid in sweep.targets)
        if name not in (None, "cross") and "text_only" in regimes:
            raise ValueError(
                f"conditioning: with {name} and regime text_only nothing would attend; give --regimes full, or "
                "--conditioning cross"
            )

    def _target(self, grid: TargetGrid, *, on_gpus: bool) -> TargetGrid:
        if self.model is not None and self.model not in MODELS:
            raise ValueError(f"unknown model {self.model!r}; there are {', '.join(MODELS)}")
        profile = get_profile(self.target or grid.target)
        gpus = grid.num_gpus if self.gpus is None else self.gpus
        if not on_gpus and not 1 <= gpus <= profile.gpus_per_node:
            raise ValueError(f"gpus must be 1 to {profile.gpus_per_node}, one node of {profile.label}, got {gpus}")
        given = self._axes(grid) | {
            "seq_lens": parse_lengths("predicted_lens", self.predicted_lens)
            or parse_lengths("seq_lens", self.seq_lens),
            "model_preset": self.model,
            "target": None if self.target is None else profile.target,
            "num_gpus": self.gpus,
            "conditioning": self._conditioning(),
            "every_policy": self.every_policy or None,
            "search": self.search,
        }
        # A preset's choice of policies is for its own points.
        own = (self.seq_lens, self.predicted_lens, self.strategies, self.sp_degrees, self.model, self.target, self.gpus)
        if self.policies is None and any(option is not None for option in own):
            given["policies"] = DEFAULT_POLICIES
        return replace(grid, **_said(given))


def _said(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}
