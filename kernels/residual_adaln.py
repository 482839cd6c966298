"""A gated residual and the adaLN modulate that follows it, as one custom op: longreel::gated_residual_adaln.

z = x + gate * y and modulated = LayerNorm(z) * (1 + scale) + shift, both returned. Fused, z is not read again: with
n = B S C elements of e bytes 4 n e are moved forward (5 n e apart) and 6 n e backward (9 n e with autograd's sum).
Source: Peebles and Xie 2022, DiT (arXiv:2212.09748), adaLN-zero block.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longreel.kernels import reference
from longreel.kernels.checks import check_number, check_shape
from longreel.kernels.memory_bound import count_no_flops
from longreel.kernels.offsets import check_modulation
from longreel.kernels.pointwise import resolve_pointwise_provider


def _implementation(provider: str) -> ModuleType:
    if provider == "triton":
        from longreel.kernels import triton_adaln

        return triton_adaln
    return reference


@torch.library.custom_op("longreel::gated_residual_adaln", mutates_args=())
def gated_residual_adaln_op(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    cu_seqlens: Tensor | None,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward op: (z, modulated, mean, rstd); see gated_residual_adaln()."""
    return _implementation(provider).gated_residual_adaln_fwd(x, y, gate, shift, scale, eps, cu_seqlens)


@torch.library.custom_op("longreel::gated_residual_adaln_backward", mutates_args=())
def gated_residual_adaln_backward_op(
    dz: Tensor,
    dmodulated: Tensor,
    y: Tensor,
    z: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    cu_seqlens: Tensor | None,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward op: (dx, dy, dgate, dshift, dscale)."""
    return _implementation(provider).gated_residual_adaln_bwd(dz, dmodulated, y, z, gate, scale, mean, rstd, cu_seqlens)


@gated_residual_adaln_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stat = x.new_empty(x.shape[:-1], dtype=reference.compute_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), stat, torch.empty_like(stat)


@gated_residual_adaln_backward_op.register_fake
def _(
    dz: Tensor, dmodulated: Tensor, y: Tensor, z: Tensor, gate: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dy = z.new_empty(z.shape), y.new_empty(y.shape)
    dgate, dshift, dscale = (gate.new_empty(gate.shape) for _ in range(3))
    return dx, dy, dgate, dshift, dscale


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, y, gate, _, scale, _, cu_seqlens, ctx.provider = inputs
    z, _, mean, rstd = output
    ctx.save_for_backward(y, z, gate, scale, mean, rstd, cu_seqlens)
    ctx.mark_non_differentiable(mean, rstd)


def _grad(ctx: Any, dz: Tensor, dmodulated: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = gated_residual_adaln_backward_op(dz, dmodulated, *ctx.saved_tensors, ctx.provider)
    return *grads, None, None, None


gated_residual_adaln_op.register_autograd(_grad, setup_context=_save)


count_no_flops(gated_residual_adaln_op, gated_residual_adaln_backward_op)


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """gated_residual(x, y, gate) and adaln_modulate of it, in one pass.

    Args:
        x, y: [B, S, C].
        gate, shift, scale: [B, C], or [N, C]: row n modulates the tokens of segment n of cu_seqlens.
        eps: added to the variance.
        cu_seqlens: [N + 1] offsets (int64 or int32) of the segments that one sequence (B = 1) falls into, or None:
            every sample is one. A segment is what shares a row: a packed clip, a frame of it; it may be empty.
        provider: see resolve_pointwise_provider.

    Returns:
        z = x + gate * y and LayerNorm(z) * (1 + scale) + shift, both [B, S, C] in x's dtype; the LayerNorm sees z as
        it is returned, rounded.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes, devices or offsets that do not fit, or a provider that cannot run.
    """
    cu_seqlens = check_modulation({"gate": gate, "shift": shift, "scale": scale}, x, cu_seqlens)
    check_shape("y", y, "x", x)
    check_number("eps", eps, minimum=0.0)
    provider = resolve_pointwise_provider(provider, x)
    return gated_residual_adaln_op(x, y, gate, shift, scale, eps, cu_seqlens, provider)[:2]
