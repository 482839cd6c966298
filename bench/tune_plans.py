"""Which constants a campaign tunes, at which shapes, and how each is timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

from longreel.bench import providers
from longreel.bench.ops import OpCase
from longreel.bench.tiles import Kernel
from longreel.bench.timing import TimingRule
from longreel.kernels.triton_rows_tuning import RowKernel

ATTENTION_KERNELS: tuple[Kernel, ...] = ("forward", "dkdv", "dq", "fused")
ROW_KERNELS: tuple[RowKernel, ...] = get_args(RowKernel)
_PORTABLE, _HOPPER, _ATOMIC = "triton", "triton-hopper", "triton-atomic"
# After all others, as the one most likely to take the device down with it.
_LAST: tuple[Kernel, ...] = ("hopper",)
# What launches a kernel over rows, by the name that stands before its direction.
_OPS = {
    "adaln": "adaln_modulate",
    "gated_adaln": "gated_residual_adaln",
    "gated": "gated_residual",
    "gelu": "bias_gelu",
    "pack": "sp_pack_heads",
    "unpack": "sp_unpack_heads",
    "merge": "merge_attention",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One kernel, at the case whose shape stands for its length class."""

    kernel: Kernel
    case: OpCase

    @property
    def direction(self) -> str:
        """What is timed: the direction of the op in which the kernel is launched."""
        forward = self.kernel in ("forward", "hopper", "unpack") or self.kernel.endswith("_fwd")
        return "forward" if forward else "backward"

    @property
    def provider(self) -> str | None:
        """The provider that launches the kernel, as kernels/ lists them; None where no provider does."""
        if self.kernel in ROW_KERNELS:
            return _PORTABLE
        name = {"fused": _ATOMIC, "hopper": _HOPPER}.get(self.kernel, _PORTABLE)
        return name if name in providers.kernel_providers("attention") else None


@dataclass(frozen=True, kw_only=True, slots=True)
class TunePlan:
    """What is tuned, in this order.

    Args:
        targets: kernels and cases. device: torch device.
        rule: of the search. final_rule: of the decision between the best and the current.
        most: candidates per kernel. setup_s: what a candidate may take beside its timing, for compilation and the gate.
    """

    targets: tuple[Target, ...]
    device: str
    rule: TimingRule
    final_rule: TimingRule
    most: int = 100
    setup_s: float = 20.0


def attention_targets(case: OpCase, kernels: tuple[Kernel, ...] = ATTENTION_KERNELS) -> tuple[Target, ...]:
    """Attention's kernels at one case."""
    return tuple(Target(kernel=kernel, case=case) for kernel in kernels)


def row_targets(shape: OpCase, kernels: tuple[RowKernel, ...] = ROW_KERNELS) -> tuple[Target, ...]:
    """The memory-bound kernels, each as part of its op at the sizes of this case."""
    return tuple(
        Target(kernel=kernel, case=replace(shape, op=_OPS[kernel.removesuffix("_fwd").removesuffix("_bwd")]))
        for kernel in kernels
    )


def hopper_plans(device: str) -> tuple[TunePlan, TunePlan]:
    """What a campaign of nine minutes tunes, and what it goes on with; shapes fill a Hopper GPU many times over."""
    rule = TimingRule(min_samples=6, max_samples=10, budget_s=0.05, wall_cap_s=20.0, warm_up_s=0.02)
    final = TimingRule(min_samples=20, max_samples=40, budget_s=0.3, wall_cap_s=30.0, warm_up_s=0.1)

    def attention(seq_len: int, head_dim: int) -> OpCase:
        return OpCase(op="attention", dtype="bf16", seq_len=seq_len, num_heads=8, head_dim=head_dim)

    def rows(seq_len: int) -> OpCase:
        return OpCase(op="adaln_modulate", dtype="bf16", seq_len=seq_len, num_heads=16, head_dim=72)

    options: dict[str, Any] = {"device": device, "rule": rule, "final_rule": final}

    def plan(cases: tuple[OpCase, ...], row_shape: OpCase) -> TunePlan:
        ordinary = tuple(target for case in cases for target in attention_targets(case))
        last = tuple(target for case in cases for target in attention_targets(case, _LAST))
        return TunePlan(targets=(*ordinary, *row_targets(row_shape), *last), **options)

    return plan((attention(32_768, 72),), rows(131_072)), plan(
        (attention(32_768, 128), attention(8192, 72)), rows(8192)
    )
