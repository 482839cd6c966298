"""Attention with its log-sum-exp, as custom ops: longreel::attention, longreel::attention_packed and their backwards.

out = softmax(scale * q k^T) v, lse = log sum exp(scale * q k^T); both differentiable (delta -= dlse).
Shapes: q [B, S, H, D], k and v [B, T, H, D], out like q, lse [B, H, S] in fp32 (fp64 for fp64 inputs).
FLOPs: forward 4 B S T H D, backward 10 B S T H D (five matrix products).
Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691), equations for the backward pass.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longreel.kernels import reference, sdpa
from longreel.kernels.checks import (
    check_head_dim,
    check_last_dim,
    check_number,
    check_same,
    check_tensor,
    check_triton_dtype,
)
from longreel.kernels.offsets import check_cu_seqlens
from longreel.kernels.padding import end_to_end, padded_segments
from longreel.kernels.triton_common import require_triton

# Largest softmax_scale either way: scores, and what a kernel makes of them in fp32, stay finite for products to 1e20.
MAX_SCALE = 1e18
PROVIDERS = ("torch", "sdpa-flash", "triton", "triton-atomic", "triton-hopper", "triton-hopper-atomic")


def resolve_attention_provider(provider: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The implementation that runs for this request: what `auto` picks, or the named one.

    Args:
        provider: `auto` (on CUDA Triton, and the eager specification for fp64, which no kernel computes in; elsewhere
            the eager specification), `torch`, `sdpa-flash` (half precision only on CUDA),
            `triton` (CUDA, or CPU under TRITON_INTERPRET=1), `triton-atomic` (a backward with fewer products that is
            not deterministic), `triton-hopper` (a forward for Hopper GPUs alone; see triton_attention_hopper) or
            `triton-hopper-atomic` (that forward with that backward).
        device: where the tensors live.
        dtype: of the tensors; None asks what runs for half precision.

    Raises:
        ValueError: the name is unknown or that provider is not there; the message says why and lists what is.
    """
    if provider == "auto":
        if device.type != "cuda" or dtype == torch.float64:
            return "torch"
        require_triton(device)
        return "triton"
    if provider not in PROVIDERS:
        raise ValueError(f"unknown attention provider {provider!r}; providers are auto, {', '.join(PROVIDERS)}")
    if provider == "sdpa-flash" and device.type == "cuda" and dtype not in (None, torch.float16, torch.bfloat16):
        raise ValueError(
            f"attention provider 'sdpa-flash' has no {dtype} on CUDA; use precision bf16, or provider torch or auto"
        )
    if provider.startswith("triton"):
        require_triton(device, provider)
    return provider


def _implementation(provider: str) -> ModuleType:
    """The module whose attention_fwd and attention_bwd run for a resolved provider."""
    if provider.startswith("triton"):
        # Triton is optional, and importing the kernels takes time.
        form = provider.removeprefix("triton").replace("-", "_")
        return importlib.import_module(f"longreel.kernels.triton_attention{form}")
    return sdpa if provider == "sdpa-flash" else reference


@torch.library.custom_op("longreel::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    provider: str,
) -> tuple[Tensor, Tensor]:
    """Forward op; see attention()."""
    out, lse = _implementation(provider).attention_fwd(q, k, v, softmax_scale, cu_seqlens_q, cu_seqlens_k)
    return out, lse


@torch.library.custom_op("longreel::attention_backward", mutates_args=())
def attention_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward op: (dq, dk, dv), contiguous."""
    dq, dk, dv = _implementation(provider).attention_bwd(
        dout, dlse, q, k, v, out, lse, softmax_scale, cu_seqlens_q, cu_seqlens_k
    )
    return dq, dk, dv


@torch.library.custom_op("longreel::attention_packed", mutates_args=())
def attention_packed_op(
    qkv: Tensor, softmax_scale: float, cu_seqlens: Tensor | None, provider: str
) -> tuple[Tensor, Tensor]:
    """Forward op on one projection output; see attention_packed()."""
    return attention_op(*qkv.unbind(2), softmax_scale, cu_seqlens, cu_seqlens, provider)


@torch.library.custom_op("longreel::attention_packed_backward", mutates_args=())
def attention_packed_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    cu_seqlens: Tensor | None,
    provider: str,
) -> Tensor:
    """Backward op: dqkv [B, S, 3, H, D], one tensor; the Triton kernels write it in place, others stack it."""
    if provider.startswith("triton"):
        dqkv: Tensor = _implementation(provider).attention_packed_bwd(
            dout, dlse, qkv, out, lse, softmax_scale, cu_seqlens
        )
        return dqkv
    grads = attention_backward_op(dout, dlse, *qkv.unbind(2), out, lse, softmax_scale, cu_seqlens, cu_seqlens, provider)
    return torch.stack(grads, dim=2)


def _lse_like(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=reference.compute_dtype(q.dtype))


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _lse_like(q)


@attention_backward_op.register_fake
def _(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@attention_packed_op.register_fake
def _(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    q = qkv.select(2, 0)
    return q.new_empty(q.shape), _lse_like(q)


@attention_packed_backward_op.register_fake
def _(dout: Tensor, dlse: Tensor | None, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.softmax_scale, cu_seqlens_q, cu_seqlens_k, ctx.provider = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.set_materialize_grads(False)


def _attention_grad(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv = attention_backward_op(
        dout, dlse, q, k, v, out, lse, ctx.softmax_scale, cu_seqlens_q, cu_seqlens_k, ctx.provider
    )
    return dq, dk, dv, None, None, None, None


attention_op.register_autograd(_attention_grad, setup_context=_save_attention)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.softmax_scale, cu_seqlens, ctx.provider = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _packed_grad(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, out, lse, cu_seqlens = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dqkv = attention_packed_backward_op(dout, dlse, qkv, out, lse, ctx.softmax_scale, cu_seqlens, ctx.provider)
    return dqkv, None, None, None


attention_packed_op.register_autograd(_packed_grad, setup_context=_save_packed)


def attention_flops(q_shape: Any, k_shape: Any, products: int = 2) -> int:
    """FLOPs of `products` matrix products of attention's size: 2 in forward, 5 in backward; a multiply-add is 2."""
    batch, q_len, heads, head_dim = q_shape
    return 2 * products * batch * heads * q_len * k_shape[1] * head_dim


@register_flop_formula(torch.ops.longreel.attention)
def _attention_flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    return attention_flops(q, k)


@register_flop_formula(torch.ops.longreel.attention_backward)
def _attention_backward_flops(dout: Any, dlse: Any, q: Any, k: Any, *_: Any, **__: Any) -> int:
    return attention_flops(q, k, products=5)


@register_flop_formula(torch.ops.longreel.attention_packed)
def _packed_flops(qkv: Any, *_: Any, **__: Any) -> int:
    shape = (*qkv[:2], *qkv[3:])
    return attention_flops(shape, shape)


@register_flop_formula(torch.ops.longreel.attention_packed_backward)
def _packed_backward_flops(dout: Any, dlse: Any, qkv: Any, *_: Any, **__: Any) -> int:
    shape = (*qkv[:2], *qkv[3:])
    return attention_flops(shape, shape, products=5)


def _scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return head_dim**-0.5
    check_number("softmax_scale", softmax_scale)
    if abs(softmax_scale) > MAX_SCALE:
        raise ValueError(f"softmax_scale must be at most {MAX_SCALE:g} either way, got {softmax_scale}")
    return float(softmax_scale)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Non-causal attention and its log-sum-exp, both differentiable.

    Args:
        q: [B, S, H, D], D a multiple of 8 up to 128; any strides with a contiguous last dim.
        k, v: [B, T, H, D]; T may differ from S and may be 0 (out 0, lse -inf, gradients 0).
        softmax_scale: factor of the scores, D ** -0.5 when None.
        cu_seqlens_q, cu_seqlens_k: [N + 1] offsets of packed sequences (B = 1), both or none.
        kv_lengths: [B] keys that each sample has, 0 to T, of a batch padded at the end; None: all T. Keys and values
            behind weigh nothing, whatever they are, and their gradients are 0. Not together with cu_seqlens.
            Rows of padding among the queries are as others: drop them, or their gradient. Inputs whose samples do
            not lie end to end are copied; a FLOP counter takes the batch for one sequence, as any packed one.
        provider: see resolve_attention_provider; `triton` computes in bf16, fp16 and fp32.

    Returns:
        out [B, S, H, D] and lse [B, H, S] (fp32, or fp64 for fp64 inputs).

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes, devices, strides, scale or offsets that do not fit, or a provider that is not there.
    """
    for name, tensor, dims in (("q", q, "[B, S, H, D]"), ("k", k, "[B, T, H, D]"), ("v", v, "[B, T, H, D]")):
        check_tensor(name, tensor, dims)
        check_same(name, tensor, "q", q)
        check_last_dim(name, tensor)
    check_head_dim("q", q.shape[-1])
    if kv_lengths is not None and (cu_seqlens_q is not None or cu_seqlens_k is not None):
        raise ValueError("kv_lengths is for padded batches, cu_seqlens for packed ones: give one or the other")
    if k.shape != v.shape:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} must have one shape")
    if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(f"k {list(k.shape)} must equal q {list(q.shape)} in batch, heads and head_dim")
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k come together: give both or none")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        if q.shape[0] != 1:
            raise ValueError(f"cu_seqlens packs sequences into batch 1, but q has batch {q.shape[0]}")
        cu_seqlens_q = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[1], q.device)
        num_segments = cu_seqlens_q.numel() - 1
        cu_seqlens_k = check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[1], q.device, num_segments)
    scale = _scale(softmax_scale, q.shape[-1])
    provider = resolve_attention_provider(provider, q.device, q.dtype)
    if provider.startswith("triton"):
        check_triton_dtype("q", q.dtype)
    if kv_lengths is None or not q.shape[0]:
        return attention_op(q, k, v, scale, cu_seqlens_q, cu_seqlens_k, provider)
    segments = padded_segments(kv_lengths, q, k)
    out, lse = attention_op(*(end_to_end(x) for x in (q, k, v)), scale, *segments, provider)
    return out.view(q.shape), lse[0].unflatten(1, q.shape[:2]).transpose(0, 1)


def attention_packed(
    qkv: Tensor,
    *,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Self-attention on the projection's own output; backward writes one dqkv.

    Args:
        qkv: [B, S, 3, H, D]; any strides with a contiguous last dim.
        softmax_scale, provider: as in attention().
        cu_seqlens: [N + 1] offsets of packed sequences (B = 1), or None.

    Returns:
        out [B, S, H, D] and lse [B, H, S].

    Raises:
        TypeError, ValueError: as attention().
    """
    check_tensor("qkv", qkv, "[B, S, 3, H, D]")
    if qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [B, S, 3, H, D], got {list(qkv.shape)}")
    check_last_dim("qkv", qkv)
    check_head_dim("qkv", qkv.shape[-1])
    if cu_seqlens is not None:
        if qkv.shape[0] != 1:
            raise ValueError(f"cu_seqlens packs sequences into batch 1, but qkv has batch {qkv.shape[0]}")
        cu_seqlens = check_cu_seqlens("cu_seqlens", cu_seqlens, qkv.shape[1], qkv.device)
    scale = _scale(softmax_scale, qkv.shape[-1])
    provider = resolve_attention_provider(provider, qkv.device, qkv.dtype)
    if provider.startswith("triton"):
        check_triton_dtype("qkv", qkv.dtype)
    return attention_packed_op(qkv, scale, cu_seqlens, provider)
