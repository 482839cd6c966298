"""The command line of the micro-benchmarks, and the plan that it describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from longreel.bench.micro_sweep import MicroPlan, sweep_cases
from longreel.bench.ops import DTYPES, OPS, ROOFLINES, OpCase
from longreel.bench.options import parse_lengths
from longreel.bench.providers import known_providers
from longreel.bench.tiles import read_tiles
from longreel.bench.timing import TimingRule
from longreel.reports.op_records import DIRECTIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """What is measured unless the command line says otherwise.

    Args:
        seq_lens, head_dims, num_heads: of attention; model_heads x head_dim is the width of the other ops.
        providers: None for all. rule: timing.
        case_s: seconds that a case may take, see MicroPlan.
        matmul: rows and width of the compute roofline. clone_rows: rows of the memory roofline.
    """

    device: str
    ops: tuple[str, ...]
    seq_lens: tuple[int, ...]
    head_dims: tuple[int, ...]
    num_heads: int
    model_heads: int
    dtypes: tuple[str, ...]
    providers: tuple[str, ...] | None
    rule: TimingRule
    matmul: int
    clone_rows: int
    case_s: float | None = None

    def rooflines(self, dtype: str) -> tuple[OpCase, OpCase]:
        """The matrix product and the copy that every figure is held against."""
        width = {"num_heads": 1, "head_dim": self.matmul}
        copy = {"num_heads": self.model_heads, "head_dim": self.head_dims[0]}
        return (
            OpCase(op="matmul", dtype=dtype, seq_len=self.matmul, **width),
            OpCase(op="clone", dtype=dtype, seq_len=self.clone_rows, **copy),
        )


MEASURED_OPS = tuple(op for op in OPS if op not in ROOFLINES)

# Every op on a CPU in under half a minute: nothing is compiled.
SMOKE = Preset(
    device="cpu",
    ops=MEASURED_OPS,
    seq_lens=(256,),
    head_dims=(72,),
    num_heads=2,
    model_heads=4,
    dtypes=("fp32",),
    providers=("triton", "eager", "sdpa-flash"),
    rule=TimingRule(min_samples=3, max_samples=10, budget_s=0.02, wall_cap_s=5.0, warm_up_s=0.0),
    matmul=512,
    clone_rows=4096,
)
# DiT-XL/2's width, two heads of attention as one rank of eight has them, to the longest published length.
HOPPER = Preset(
    device="cuda",
    ops=MEASURED_OPS,
    seq_lens=(4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 819_200),
    head_dims=(72, 64, 128),
    num_heads=2,
    model_heads=16,
    dtypes=("bf16",),
    providers=None,
    rule=TimingRule(min_samples=5, max_samples=50, budget_s=0.2, wall_cap_s=60.0, warm_up_s=0.05),
    matmul=8192,
    clone_rows=819_200,
    case_s=60.0,
)
PRESETS = {"smoke": SMOKE, "hopper": HOPPER}


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroConfig:
    """Measure ops against their peers, behind a correctness gate, and write records and a report.

    Lists are separated by commas. What is not given is as the preset says.

    Args:
        preset: `hopper` (needs a CUDA device), `smoke` (CPU, under half a minute), or `auto` by what is here.
        out: folder of records.jsonl, ops.csv and report.html; out/micro-<preset> if not given.
        ops: ops to measure, such as attention,adaln_modulate; the rooflines always run.
        providers: who computes them, such as triton,sdpa-cudnn; all that an op has if not given.
        directions: some of forward,backward,both.
        seq_lens: lengths in tokens, such as 4k,8k or 4k..819200 (doubling, and the end).
        head_dims: head dims of attention, such as 72,64,128; the first is also that of the other ops.
        num_heads: heads of attention.
        model_heads: heads of the other ops, whose width is model_heads x head_dim.
        dtypes: some of bf16,fp16,fp32.
        device: torch device, such as cuda or cuda:1.
        wall_cap: seconds that the timing of one op, shape and direction may take, all providers together.
        case_seconds: seconds that one op and shape may take by its estimate: beyond them it gets fewer samples, then
            fewer peers. 60 on a GPU, no limit on a CPU.
        min_samples: samples at least, where cap and case-seconds allow.
        resume: leave out what the folder holds from the same source and environment; --no-resume measures again.
        retry_errors: try what failed before once more; otherwise its row stands.
        minutes: stop starting new cases after this many minutes; running the command again goes on.
        isolate: each provider in a process of its own (no alternation, so verdicts are weaker).
        tiles: tuning.json of a tuning run, whose constants are used.
        commit: the commit of this tree, for a copy that is no git checkout.
    """

    preset: str = "auto"
    out: Path | None = None
    ops: str | None = None
    providers: str | None = None
    directions: str | None = None
    seq_lens: str | None = None
    head_dims: str | None = None
    num_heads: int | None = None
    model_heads: int | None = None
    dtypes: str | None = None
    device: str | None = None
    wall_cap: float | None = None
    case_seconds: float | None = None
    min_samples: int | None = None
    resume: bool = True
    retry_errors: bool = False
    minutes: float | None = None
    isolate: bool = False
    tiles: Path | None = None
    commit: str | None = None

    @property
    def preset_name(self) -> str:
        """The preset, `auto` resolved."""
        if self.preset == "auto":
            return "hopper" if torch.cuda.is_available() else "smoke"
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; there are auto, {', '.join(PRESETS)}")
        return self.preset

    @property
    def folder(self) -> Path:
        """Where the records go."""
        return self.out.expanduser() if self.out is not None else Path("out") / f"micro-{self.preset_name}"

    def resolve(self) -> MicroPlan:
        """The plan; ValueError names the option, its value and what would work."""
        preset = self._preset()
        check_device(preset.device, "use --preset smoke or --device cpu")
        directions = names("directions", self.directions, DIRECTIONS) or DIRECTIONS
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        if self.case_seconds is not None and not self.case_seconds > 0:
            raise ValueError(f"case_seconds must be positive, got {self.case_seconds}")
        cases = tuple(case for dtype in preset.dtypes for case in preset.rooflines(dtype)) + sweep_cases(
            preset.ops,
            seq_lens=preset.seq_lens,
            head_dims=preset.head_dims,
            num_heads=preset.num_heads,
            model_heads=preset.model_heads,
            dtypes=preset.dtypes,
        )
        return MicroPlan(
            cases=cases,
            providers=preset.providers,
            directions=directions,
            rule=preset.rule,
            device=preset.device,
            isolate=self.isolate,
            case_s=preset.case_s,
            tiles=() if self.tiles is None else read_tiles(self.tiles),
        )

    def _preset(self) -> Preset:
        preset = PRESETS[self.preset_name]
        rule: dict[str, float | int | None] = {"wall_cap_s": self.wall_cap, "min_samples": self.min_samples}
        if self.min_samples is not None:
            rule["max_samples"] = max(self.min_samples, preset.rule.max_samples)
        given = {
            "device": self.device,
            "ops": names("ops", self.ops, MEASURED_OPS),
            "providers": names("providers", self.providers, known_providers()),
            "seq_lens": parse_range("seq_lens", self.seq_lens),
            "head_dims": _head_dims(self.head_dims),
            "num_heads": _positive("num_heads", self.num_heads),
            "model_heads": _positive("model_heads", self.model_heads),
            "dtypes": names("dtypes", self.dtypes, tuple(DTYPES)),
            "case_s": self.case_seconds,
            "rule": replace(preset.rule, **{name: value for name, value in rule.items() if value is not None}),  # type: ignore[arg-type]
        }
        return replace(preset, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def check_device(text: str, instead: str) -> None:
    """ValueError unless this is a device of this machine that can be timed; `instead` says what else would work."""
    name, _, index = text.partition(":")
    if name not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"device must be cpu, cuda or cuda:<index>, got {text!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {text!r}: there is no CUDA device here; {instead}")
    if name == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device {text!r}: this machine has {torch.cuda.device_count()}; the first is cuda:0")


def names(option: str, text: str | None, known: Sequence[str]) -> tuple[str, ...] | None:
    """`a,b` -> (a, b); ValueError for a name that is not known; None stays None."""
    if text is None:
        return None
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in found:
        if name not in known:
            raise ValueError(f"{option}: unknown {name!r}; there are {', '.join(known)}")
    return found


def parse_range(option: str, text: str | None) -> tuple[int, ...] | None:
    """Lengths as options.parse_lengths reads them, where `4k..20000` stands for 4096, 8192, 16384, 20000."""
    if text is None:
        return None
    lengths: set[int] = set()
    for word in text.split(","):
        bounds = [(parse_lengths(option, part) or (0,))[0] for part in word.split("..")]
        if len(bounds) > 2 or bounds[0] > bounds[-1]:
            raise ValueError(f"{option}: {word.strip()!r} is not a range; write 4k..819200, from short to long")
        length = bounds[0]
        while length < bounds[-1]:
            lengths.add(length)
            length *= 2
        lengths.add(bounds[-1])
    return tuple(sorted(lengths))


def _head_dims(text: str | None) -> tuple[int, ...] | None:
    """In the order given: the first is that of the ops without heads."""
    if text is None:
        return None
    found = tuple(dict.fromkeys(int(word) if word.strip().isdigit() else 0 for word in text.split(",")))
    for head_dim in found:
        if head_dim % 8 or not 8 <= head_dim <= 128:
            raise ValueError(f"head_dims: {text!r} must be multiples of 8 up to 128, such as 72,64,128")
    return found


def _positive(option: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{option} must be at least 1, got {value}")
    return value
