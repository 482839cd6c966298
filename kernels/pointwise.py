"""The memory-bound ops of a DiT block, as custom ops: adaLN modulate, gated residual, bias + GELU.

Bytes moved, fused, with n = B S C elements of e bytes: adaLN 2 n e forward, 3 n e backward; gated residual 3 n e and
3 n e; bias-GELU 2 n e and 3 n e. Statistics in fp32 (fp64 for fp64 inputs). A gated residual fused with
the adaLN after it: residual_adaln.py.
Source: Peebles and Xie 2022, DiT (arXiv:2212.09748), adaLN-zero block.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longreel.kernels import reference
from longreel.kernels.checks import (
    TRITON_DTYPES,
    check_number,
    check_rows,
    check_same,
    check_shape,
)
from longreel.kernels.memory_bound import count_no_flops
from longreel.kernels.offsets import check_modulation
from longreel.kernels.triton_common import require_triton

PROVIDERS = ("torch", "triton")


def resolve_pointwise_provider(provider: str, x: Tensor) -> str:
    """The implementation that runs a memory-bound op on x: what `auto` picks, or the named one.

    Args:
        provider: `auto` (on CUDA Triton, and the eager specification for fp64, which no kernel computes in; elsewhere
            the eager specification), `torch` or `triton`.
        x: the op's first tensor; its device and dtype decide what can run.

    Raises:
        ValueError: the name is unknown, or Triton cannot run here; the message says why and what would work.
    """
    if provider == "auto":
        if x.device.type != "cuda" or x.dtype == torch.float64:
            return "torch"
        require_triton(x.device)
        return "triton"
    if provider not in PROVIDERS:
        raise ValueError(f"unknown pointwise provider {provider!r}; providers are auto, {', '.join(PROVIDERS)}")
    if provider == "triton":
        require_triton(x.device)
        if x.dtype not in TRITON_DTYPES:
            raise ValueError(
                f"provider 'triton' takes bfloat16, float16 and float32, got {x.dtype}; use provider 'torch'"
            )
    return provider


# Triton is optional, so its kernels are imported by the call that wants them. Their launchers are named as the
# specifications.
def _adaln(provider: str) -> ModuleType:
    if provider == "triton":
        from longreel.kernels import triton_adaln

        return triton_adaln
    return reference


def _residual(provider: str) -> ModuleType:
    if provider == "triton":
        from longreel.kernels import triton_residual

        return triton_residual
    return reference


def _gelu(provider: str) -> ModuleType:
    if provider == "triton":
        from longreel.kernels import triton_gelu

        return triton_gelu
    return reference


@torch.library.custom_op("longreel::adaln_modulate", mutates_args=())
def adaln_modulate_op(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, cu_seqlens: Tensor | None, provider: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward op: (y, mean, rstd); see adaln_modulate()."""
    return _adaln(provider).adaln_modulate_fwd(x, shift, scale, eps, cu_seqlens)


@torch.library.custom_op("longreel::adaln_modulate_backward", mutates_args=())
def adaln_modulate_backward_op(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, cu_seqlens: Tensor | None, provider: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward op: (dx, dshift, dscale)."""
    return _adaln(provider).adaln_modulate_bwd(dy, x, scale, mean, rstd, cu_seqlens)


@torch.library.custom_op("longreel::gated_residual", mutates_args=())
def gated_residual_op(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor | None, provider: str) -> Tensor:
    """Forward op; see gated_residual()."""
    return _residual(provider).gated_residual_fwd(x, y, gate, cu_seqlens)


@torch.library.custom_op("longreel::gated_residual_backward", mutates_args=())
def gated_residual_backward_op(
    dz: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor | None, provider: str
) -> tuple[Tensor, Tensor]:
    """Backward op: (dy, dgate)."""
    return _residual(provider).gated_residual_bwd(dz, y, gate, cu_seqlens)


@torch.library.custom_op("longreel::bias_gelu", mutates_args=())
def bias_gelu_op(x: Tensor, bias: Tensor, provider: str) -> Tensor:
    """Forward op; see bias_gelu()."""
    return _gelu(provider).bias_gelu_fwd(x, bias)


@torch.library.custom_op("longreel::bias_gelu_backward", mutates_args=())
def bias_gelu_backward_op(dy: Tensor, x: Tensor, bias: Tensor, provider: str) -> tuple[Tensor, Tensor]:
    """Backward op: (dx, dbias)."""
    return _gelu(provider).bias_gelu_bwd(dy, x, bias)


@adaln_modulate_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    stat = x.new_empty(x.shape[:-1], dtype=reference.compute_dtype(x.dtype))
    return x.new_empty(x.shape), stat, torch.empty_like(stat)


@adaln_modulate_backward_op.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@gated_residual_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@gated_residual_backward_op.register_fake
def _(dz: Tensor, y: Tensor, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


@bias_gelu_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@bias_gelu_backward_op.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _save_adaln(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, scale, _, cu_seqlens, ctx.provider = inputs
    ctx.save_for_backward(x, scale, *output[1:], cu_seqlens)
    ctx.mark_non_differentiable(*output[1:])


def _adaln_grad(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, scale, mean, rstd, cu_seqlens = ctx.saved_tensors
    return *adaln_modulate_backward_op(dy, x, scale, mean, rstd, cu_seqlens, ctx.provider), None, None, None


adaln_modulate_op.register_autograd(_adaln_grad, setup_context=_save_adaln)


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gate, cu_seqlens, ctx.provider = inputs
    ctx.save_for_backward(y, gate, cu_seqlens)


def _gated_grad(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    return dz, *gated_residual_backward_op(dz, *ctx.saved_tensors, ctx.provider), None, None


gated_residual_op.register_autograd(_gated_grad, setup_context=_save_gated)


def _save_gelu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.provider = inputs
    ctx.save_for_backward(*tensors)


def _gelu_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *bias_gelu_backward_op(dy, *ctx.saved_tensors, ctx.provider), None


bias_gelu_op.register_autograd(_gelu_grad, setup_context=_save_gelu)


count_no_flops(
    adaln_modulate_op,
    adaln_modulate_backward_op,
    gated_residual_op,
    gated_residual_backward_op,
    bias_gelu_op,
    bias_gelu_backward_op,
)


def adaln_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    provider: str = "auto",
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, LayerNorm over C without affine.

    Args:
        x: [B, S, C].
        shift, scale: [B, C], or [N, C]: row n modulates the tokens of segment n of cu_seqlens.
        eps: added to the variance.
        cu_seqlens: [N + 1] offsets (int64 or int32) of the segments that one sequence (B = 1) falls into, or None:
            every sample is one. A segment is what shares a row: a packed clip, a frame of it; it may be empty.
        provider: see resolve_pointwise_provider.

    Returns:
        [B, S, C] in x's dtype.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes, devices or offsets that do not fit, or a provider that cannot run.
    """
    cu_seqlens = check_modulation({"shift": shift, "scale": scale}, x, cu_seqlens)
    check_number("eps", eps, minimum=0.0)
    return adaln_modulate_op(x, shift, scale, eps, cu_seqlens, resolve_pointwise_provider(provider, x))[0]


def gated_residual(
    x: Tensor, y: Tensor, gate: Tensor, *, cu_seqlens: Tensor | None = None, provider: str = "auto"
) -> Tensor:
    """x + gate * y.

    Args:
        x, y: [B, S, C].
        gate: [B, C], or [N, C]: row n gates the tokens of segment n of cu_seqlens.
        cu_seqlens: [N + 1] offsets (int64 or int32) of the segments that one sequence (B = 1) falls into, or None:
            every sample is one. A segment is what shares a row: a packed clip, a frame of it; it may be empty.
        provider: see resolve_pointwise_provider.

    Returns:
        [B, S, C] in x's dtype.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes, devices or offsets that do not fit, or a provider that cannot run.
    """
    cu_seqlens = check_modulation({"gate": gate}, x, cu_seqlens)
    check_shape("y", y, "x", x)
    return gated_residual_op(x, y, gate, cu_seqlens, resolve_pointwise_provider(provider, x))


def bias_gelu(x: Tensor, bias: Tensor, *, provider: str = "auto") -> Tensor:
    """gelu_tanh(x + bias); backward needs x and bias only.

    Args:
        x: [..., C]. bias: [C].
        provider: see resolve_pointwise_provider.

    Returns:
        [..., C] in x's dtype.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes or devices that do not fit, or a provider that cannot run.
    """
    check_rows("x", x)
    check_same("bias", bias, "x", x)
    if list(bias.shape) != [x.shape[-1]]:
        raise ValueError(f"bias must be [{x.shape[-1]}] for x {list(x.shape)}, got {list(bias.shape)}")
    return bias_gelu_op(x, bias, resolve_pointwise_provider(provider, x))
