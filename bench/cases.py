"""What a sweep runs: its points as data, in the order in which they run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from longreel.models.config import DiTConfig, preset
from longreel.parallel.config import ParallelConfig, Policy, Strategy
from longreel.reports.records import Kind, Record, Regime, Status

# One frame of a sample, in patches: 16 x 16 is a 256x256 image through SD-VAE at patch 2.
FRAME_SIDE = 16
# Text tokens of one sample, and the width of T5's features, in predicted models.
NUM_TEXT_TOKENS, TEXT_DIM = 20, 4096
# Of the one baseline of predicted points: ZeRO-2, SP 1, SDPA flash attention, full recomputation.
_BASELINE_POLICY: Policy = "full"
# Of predicted points, unless a preset or a user says otherwise.
# From the fastest to the one that needs least memory.
DEFAULT_POLICIES: tuple[Policy, ...] = ("none", "keep_attention", "full")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """How the steps of a measured point are sampled, after an untimed step on the same batch.

    Args:
        min_samples: steps timed at least. max_samples: and at most.
        budget_s: between the two, go on until this many seconds were timed.
    """

    min_samples: int = 3
    max_samples: int = 10
    budget_s: float = 0.6

    def __post_init__(self) -> None:
        if not 1 <= self.min_samples <= self.max_samples:
            raise ValueError(f"need 1 <= min_samples <= max_samples, got {self.min_samples} and {self.max_samples}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One configuration at one length.

    Args:
        kind: `measured` or `predicted`.
        model: the DiT. model_name: in words.
        parallel: how it is spread over num_devices ranks; attention provider named, not `auto`.
        device: what the ranks are, in words. target: profile of the predicted GPU, None when measured.
        seq_len: video tokens of one sample. batch_per_group: samples of one SP group, 1 when measured.
        is_baseline: the configuration that ratios refer to.
        timing: of a measured point.
        seed: of weights and data.
    """

    kind: Kind
    model: DiTConfig
    model_name: str
    parallel: ParallelConfig
    num_devices: int
    device: str
    seq_len: int
    batch_per_group: int = 1
    is_baseline: bool = False
    target: str | None = None
    timing: Timing = Timing()
    seed: int = 0

    def __post_init__(self) -> None:
        self.parallel.dp_degree(self.num_devices)
        if self.kind == "measured" and self.batch_per_group != 1:
            raise ValueError(
                f"batch_per_group must be 1 in measured points, whose oracle is one sample per data-parallel group; "
                f"got {self.batch_per_group}"
            )

    @property
    def regime(self) -> Regime:
        return "text_only" if self.model.text_only else "full"

    @property
    def dp_degree(self) -> int:
        return self.parallel.dp_degree(self.num_devices)

    @property
    def impossible(self) -> str | None:
        """Why this point cannot run, whatever the machine; None when it can."""
        try:
            self.parallel.check_heads(self.model.num_heads)
        except ValueError as error:
            return str(error)
        return None

    def config(self) -> dict[str, Any]:
        """The resolved configuration, as it goes into the record.

        Not `timing`: how often a point was timed does not make it another point.
        """
        resolved: dict[str, Any] = {"model": asdict(self.model), "parallel": asdict(self.parallel), "seed": self.seed}
        if self.kind == "predicted":
            resolved["target"] = self.target
        # As JSON gives it back: lists instead of tuples.
        return json.loads(json.dumps(resolved))

    def record(self, status: Status, *, provenance: dict[str, Any], **outcome: Any) -> Record:
        """The record of this point with what became of it."""
        p = self.parallel
        return Record(
            kind=self.kind,
            regime=self.regime,
            status=status,
            model=self.model_name,
            device=self.device,
            strategy=p.strategy,
            sp_degree=p.sp_degree,
            dp_degree=self.dp_degree,
            num_devices=self.num_devices,
            engine=p.engine,
            policy=p.policy,
            attention=p.attention_provider,
            seq_len=self.seq_len,
            batch_per_group=self.batch_per_group,
            is_baseline=self.is_baseline,
            config=self.config(),
            provenance=provenance,
            **outcome,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredGrid:
    """Measured points: a small DiT on real processes.

    Args:
        seq_lens: lengths. ranks: world sizes. strategies: `local` is ZeRO-2 data parallelism, the baseline.
        sp_degrees: of the strategies that split the sequence, where they divide the ranks.
        model: the DiT.
        max_len_mixed: longest length at which SP and DP are mixed on one world (SP 2 x DP 2 on 4 ranks).
        point_timeout_s: limit of one point.
    """

    seq_lens: tuple[int, ...]
    ranks: tuple[int, ...] = (1, 2, 4)
    strategies: tuple[Strategy, ...] = ("local", "ulysses", "fastseq")
    sp_degrees: tuple[int, ...] = (2, 4)
    model: DiTConfig
    max_len_mixed: int = 2**62
    point_timeout_s: float = 120.0

    @property
    def model_name(self) -> str:
        m = self.model
        return f"DiT of depth {m.depth}, width {m.hidden_size}, {m.num_heads} heads"


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictedGrid:
    """Predicted points of one regime: a real DiT on GPUs that are not there.

    Args:
        regime: `full` or `text_only` (the published regime, in the layout of the code behind it).
        seq_lens, strategies, sp_degrees: as for measured points.
        model: name of a DiT preset. target: GPU profile. num_gpus: GPUs of one node.
        policies: activation policies.
        every_policy: predict each of them everywhere; otherwise, of a strategy and degree, the first one that fits into
            memory, and each no further than the first length at which it does not. The baseline is everywhere.
        point_timeout_s: limit of one point.
    """

    regime: Regime
    seq_lens: tuple[int, ...]
    strategies: tuple[Strategy, ...] = ("local", "ulysses", "fastseq")
    sp_degrees: tuple[int, ...] = (2, 4, 8)
    model: str = "dit-xl-2"
    target: str = "H800"
    num_gpus: int = 8
    policies: tuple[Policy, ...] = DEFAULT_POLICIES
    every_policy: bool = False
    point_timeout_s: float = 120.0

    @property
    def dit(self) -> DiTConfig:
        text = {"conditioning": "cross", "max_text_tokens": NUM_TEXT_TOKENS, "text_dim": TEXT_DIM}
        if self.regime == "text_only":
            return preset(self.model, **text, text_only=True, cross_layout="published")
        return preset(self.model, **text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A whole sweep. Grids run in this order."""

    name: str
    measured: tuple[MeasuredGrid, ...] = ()
    predicted: tuple[PredictedGrid, ...] = ()


def small_dit(*, depth: int = 2, hidden_size: int = 64, num_heads: int = 4) -> DiTConfig:
    """The DiT of measured points: self-attention and attention to a short text in each block."""
    return DiTConfig(
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        conditioning="cross",
        text_dim=64,
        max_text_tokens=16,
    )


def smoke() -> Sweep:
    """Every kind of point once, in half a minute."""
    return Sweep(
        name="smoke",
        measured=(MeasuredGrid(seq_lens=(256,), ranks=(1, 2), model=small_dit()),),
        predicted=(PredictedGrid(regime="full", seq_lens=(8_192, 819_200), sp_degrees=(8,)),),
    )


def quick() -> Sweep:
    """What fits into three minutes on two cores."""
    lengths = (8_192, 32_768, 131_072, 262_144, 409_600, 614_400, 819_200)
    return Sweep(
        name="quick",
        measured=(MeasuredGrid(seq_lens=(1024, 2048, 4096, 8192), model=small_dit(), max_len_mixed=1024),),
        predicted=(
            PredictedGrid(regime="full", seq_lens=lengths, strategies=("local", "ulysses", "fastseq", "ring")),
            # Without recomputation no configuration fits at these lengths.
            PredictedGrid(regime="text_only", seq_lens=lengths[-2:], policies=("full",)),
        ),
    )


def thorough() -> Sweep:
    """Every policy, regime and length; about a quarter of an hour on two cores."""
    lengths = (8_192, 16_384, 32_768, 65_536, 131_072, 262_144, 409_600, 614_400, 819_200)
    return Sweep(
        name="thorough",
        measured=(MeasuredGrid(seq_lens=(1024, 2048, 4096, 8192, 16_384), model=small_dit(), point_timeout_s=300.0),),
        predicted=tuple(
            PredictedGrid(regime=regime, seq_lens=lengths, every_policy=True) for regime in ("full", "text_only")
        ),
    )


PRESETS = {"quick": quick, "smoke": smoke, "thorough": thorough}


def ulysses_degree_of(sp_degree: int, num_heads: int) -> int | None:
    """U of USP: the largest degree that leaves a ring and divides the heads, None where there is none."""
    degrees = [u for u in range(2, sp_degree) if sp_degree % u == 0 and num_heads % u == 0]
    return max(degrees, default=None)


def _spreads(
    strategies: tuple[Strategy, ...], sp_degrees: tuple[int, ...], num_devices: int, num_heads: int
) -> Iterator[dict[str, Any]]:
    """Strategy and degrees of each ParallelConfig that num_devices ranks can be split into, the baseline first."""
    if "local" in strategies:
        yield {"strategy": "local", "sp_degree": 1}
    for degree in sp_degrees:
        for strategy in strategies:
            if strategy == "local" or num_devices % degree:
                continue
            if strategy != "usp":
                yield {"strategy": strategy, "sp_degree": degree}
            elif ulysses_degree := ulysses_degree_of(degree, num_heads):
                yield {"strategy": strategy, "sp_degree": degree, "ulysses_degree": ulysses_degree}


def measured_points(grid: MeasuredGrid, *, device: str) -> list[Point]:
    """The grid's points by length, then by number of ranks: a baseline and its candidates run next to each other."""
    points = []
    for seq_len in grid.seq_lens:
        for ranks in grid.ranks:
            for spread in _spreads(grid.strategies, grid.sp_degrees, ranks, grid.model.num_heads):
                if 1 < spread["sp_degree"] < ranks and seq_len > grid.max_len_mixed:
                    continue
                longest = seq_len == max(grid.seq_lens) and len(grid.seq_lens) > 1
                points.append(
                    Point(
                        kind="measured",
                        model=grid.model,
                        model_name=grid.model_name,
                        parallel=ParallelConfig(**spread, attention_provider="sdpa-flash"),
                        num_devices=ranks,
                        device=device,
                        seq_len=seq_len,
                        is_baseline=spread["strategy"] == "local",
                        timing=Timing(min_samples=2 if longest else 3),
                    )
                )
    return points


def predicted_points(grid: PredictedGrid) -> list[list[Point]]:
    """The grid's points in groups of one length and one policy; a group's points do not depend on each other."""
    name = grid.model.replace("dit-", "DiT-").replace("-s-", "-S/").replace("-b-", "-B/")
    name = name.replace("-l-", "-L/").replace("-xl-", "-XL/")
    if grid.regime == "text_only":
        name += " in the published layout"
    return [
        [
            Point(
                kind="predicted",
                model=grid.dit,
                model_name=name,
                parallel=ParallelConfig(
                    **spread,
                    policy=policy,
                    precision="bf16",
                    attention_provider="sdpa-flash",
                ),
                num_devices=grid.num_gpus,
                device=grid.target,
                seq_len=seq_len,
                is_baseline=spread["strategy"] == "local" and policy == _BASELINE_POLICY,
                target=grid.target,
            )
            for spread in _spreads(grid.strategies, grid.sp_degrees, grid.num_gpus, grid.dit.num_heads)
            if policy in grid.policies or spread["strategy"] == "local"
        ]
        for seq_len in grid.seq_lens
        for policy in dict.fromkeys((*grid.policies, _BASELINE_POLICY))
    ]
