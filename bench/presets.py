"""The sweeps that have a name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

from longreel.bench.grids import DEFAULT_POLICIES, MeasuredGrid, TargetGrid
from longreel.bench.peers import PEERS
from longreel.models.config import CrossLayout, DiTConfig
from longreel.parallel.config import Policy, Strategy
from longreel.reports.records import Regime

# Every policy that a step may run under, from the fastest to the one that needs least memory.
REGIMES: tuple[Regime, ...] = get_args(Regime)
ALL_POLICIES: tuple[Policy, ...] = (*DEFAULT_POLICIES, "offload")
SPLITTING: tuple[Strategy, ...] = ("ulysses", "fastseq", "ring", "usp")
H800_LENGTHS = (8_192, 16_384, 32_768, 65_536, 98_304, 131_072, 196_608, 262_144, 409_600, 524_288, 614_400, 819_200)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A whole sweep.

    Args:
        name: of its preset.
        measured: grids on real processes of this machine.
        targets: grids of a node of GPUs, predicted or emulated. All grids run in this order.
        rehearsal: grids that stand in for `targets` where measuring is asked for and there are no GPUs.
        minutes: time for what is emulated; what it is too short for is left for the next run. None: no limit.
    """

    name: str
    measured: tuple[MeasuredGrid, ...] = ()
    targets: tuple[TargetGrid, ...] = ()
    rehearsal: tuple[MeasuredGrid, ...] = ()
    minutes: float | None = None


def small_dit(
    *, depth: int = 2, hidden_size: int = 64, num_heads: int = 4, text_only: bool = False, published: bool = False
) -> DiTConfig:
    """The DiT of measured points on a CPU: self-attention and attention to a short text in each block."""
    return DiTConfig(
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        conditioning="cross",
        text_dim=64,
        max_text_tokens=16,
        text_only=text_only,
        cross_layout="published" if published else "replicated",
    )


def smoke() -> Sweep:
    """Every kind of point once, in half a minute."""
    return Sweep(
        name="smoke",
        measured=(MeasuredGrid(seq_lens=(256,), ranks=(1, 2), model=small_dit()),),
        targets=(TargetGrid(regime="full", seq_lens=(8_192, 819_200), sp_degrees=(8,)),),
    )


def quick() -> Sweep:
    """What fits into three minutes on two cores."""
    lengths = (8_192, 32_768, 131_072, 262_144, 409_600, 614_400, 819_200)
    return Sweep(
        name="quick",
        # Recomputing as the baseline does, so that a ratio has one cause.
        measured=(
            MeasuredGrid(seq_lens=(1024, 2048, 4096, 8192), policies=("full",), model=small_dit(), max_len_mixed=1024),
        ),
        targets=(
            TargetGrid(regime="full", seq_lens=lengths, strategies=("local", "ulysses", "fastseq", "ring")),
            # Without recomputation no configuration fits at these lengths.
            TargetGrid(regime="text_only", seq_lens=lengths[-2:], policies=("full",)),
        ),
    )


def thorough() -> Sweep:
    """Every policy, regime and length; about a quarter of an hour on two cores."""
    lengths = (8_192, 16_384, 32_768, 65_536, 131_072, 262_144, 409_600, 614_400, 819_200)
    return Sweep(
        name="thorough",
        measured=(MeasuredGrid(seq_lens=(1024, 2048, 4096, 8192, 16_384), model=small_dit(), point_timeout_s=300.0),),
        targets=(
            TargetGrid(regime="full", seq_lens=lengths, every_policy=True),
            TargetGrid(regime="text_only", seq_lens=lengths, every_policy=True),
        ),
    )


def blog() -> Sweep:
    """The two published tables: rows of 8 and 4 GPUs, each with its baseline, in both regimes and both layouts.

    Policies: what the published ratios come from, as far as memory is the reason, is recomputation that is dropped at
    SP 2, so every row runs with and without it.
    """
    rows = ((8, (614_400, 819_200)), (4, (614_400,)))
    variants: tuple[tuple[Regime, CrossLayout], ...] = (
        ("text_only", "published"),
        ("text_only", "replicated"),
        ("full", "replicated"),
    )
    targets = tuple(
        TargetGrid(
            regime=regime,
            layout=layout,
            seq_lens=lengths,
            num_gpus=gpus,
            sp_degrees=(2,),
            policies=DEFAULT_POLICIES,
            every_policy=True,
        )
        for regime, layout in variants
        for gpus, lengths in rows
    )
    return Sweep(
        name="blog",
        targets=targets,
        rehearsal=tuple(
            MeasuredGrid(
                seq_lens=(768, 1024),
                ranks=(4,),
                sp_degrees=(2,),
                policies=DEFAULT_POLICIES,
                model=small_dit(text_only=regime == "text_only", published=layout == "published"),
            )
            for regime, layout in variants
        ),
    )


def h800() -> Sweep:
    """8 GPUs from 8,192 to 819,200 tokens: strategies, SP sizes, policies, and the longest length that fits each."""
    grid = TargetGrid(
        regime="full",
        seq_lens=H800_LENGTHS,
        strategies=("local", *SPLITTING),
        policies=ALL_POLICIES,
        every_policy=True,
        search=True,
    )
    rehearsal = MeasuredGrid(
        seq_lens=(256, 512), strategies=("local", *SPLITTING), policies=ALL_POLICIES, ranks=(4,), model=small_dit()
    )
    return Sweep(name="h800", targets=(grid,), rehearsal=(rehearsal,))


def compare() -> Sweep:
    """Ours against baselines built from public packages: DeepSpeed's and yunchang's attention, ColossalAI's ZeRO-2."""
    policies: tuple[Policy, ...] = ("none", "full")
    grid = TargetGrid(
        regime="full",
        seq_lens=(131_072, 409_600),
        strategies=("local", *SPLITTING),
        policies=policies,
        peers=tuple(PEERS),
        every_policy=True,
    )
    rehearsal = MeasuredGrid(
        seq_lens=(512,),
        strategies=grid.strategies,
        policies=policies,
        peers=grid.peers,
        ranks=(4,),
        model=small_dit(),
    )
    # ZeRO-2 by ColossalAI, beside the baseline's.
    colossalai: dict[str, Any] = {"strategies": ("local",), "engines": ("colossalai",), "peers": ()}
    return Sweep(
        name="compare",
        targets=(grid, replace(grid, **colossalai)),
        rehearsal=(rehearsal, replace(rehearsal, **colossalai)),
    )


def headline() -> Sweep:
    """The headline table on one emulated rank of eight: the baseline and our best at four lengths, then its details.

    What matters most comes first; bench/emulated_plans.py says how long it takes, and a test that the table itself
    stays within its minutes even where every rate is at its low end. Whether the baseline fits at the longest length is
    on the line through its two lengths before, so its own run there comes after the table.
    """
    baseline = TargetGrid(regime="full", seq_lens=(65_536,), strategies=(), policies=())

    def ours(*lengths: int, **axes: Any) -> TargetGrid:
        given: dict[str, Any] = {"strategies": ("ulysses",), "sp_degrees": (8,), "policies": ("keep_attention",)}
        given |= {"attentions": ("auto",), "every_policy": True, "baseline": False}
        return TargetGrid(regime="full", seq_lens=lengths, **(given | axes))

    return Sweep(
        name="headline",
        minutes=9.0,
        targets=(
            baseline,
            ours(65_536, policies=("none",)),
            replace(baseline, seq_lens=(262_144, 614_400)),
            ours(262_144, 614_400, 819_200),
            # The table is complete here. That the baseline runs out of memory, as it does.
            replace(baseline, seq_lens=(819_200,)),
            # Memory of the whole depth, what the kernels and what the exchanges give, SP 2.
            ours(819_200, strategies=("fastseq",), whole_depth=True),
            ours(65_536, 262_144, 614_400, attentions=("sdpa-flash",)),
            ours(65_536, 262_144, 614_400, strategies=("fastseq", "ring")),
            ours(614_400, 819_200, strategies=("ulysses", "fastseq"), sp_degrees=(2,)),
        ),
    )


def point() -> Sweep:
    """One point and its baseline, unless options ask for more: what the options of `reproduce` are said beside."""
    return Sweep(
        name="point",
        measured=(
            MeasuredGrid(seq_lens=(1024,), ranks=(1,), strategies=("local",), model=small_dit(), point_timeout_s=300.0),
        ),
        targets=tuple(
            TargetGrid(regime=regime, seq_lens=(8_192,), strategies=("local",), every_policy=True, policies=("full",))
            for regime in REGIMES
        ),
    )


PRESETS = {
    "quick": quick,
    "smoke": smoke,
    "thorough": thorough,
    "blog": blog,
    "h800": h800,
    "compare": compare,
    "headline": headline,
    "point": point,
}
