"""PyTorch's own flash attention as a provider of the attention op: the aten ops under SDPA that return the lse.

The backend is pinned by calling it directly, so that no dispatcher picks another. Packed sequences run segment by
segment. On a CPU a row whose scores are all -inf, by overflow, has an lse of 0 there instead of -inf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longreel.kernels.reference import compute_dtype, segments

# The CPU kernel handles the last keys, fewer than a vector of the widest registers, with a maximum that ignores NaN.
_SCALAR_KEYS = 64


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As reference.attention_fwd."""
    if _is_one_segment(q, k, cu_seqlens_q):
        out, lse, _ = _flash(q, k, v, softmax_scale)
        return out.contiguous(), lse.contiguous()
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=compute_dtype(q.dtype))
    for q_range, k_range in _segment_pairs(q, k, cu_seqlens_q, cu_seqlens_k):
        b_out, b_lse, _ = _flash(q[:, q_range], k[:, k_range], v[:, k_range], softmax_scale)
        out[:, q_range] = b_out
        lse[:, :, q_range] = b_lse
    return out, lse


def attention_bwd(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.attention_bwd.

    The flash backward has no input for dlse. Its share is dS += P * dlse, so dq += scale * dlse * (P k), which is
    attention with v = k, and dk += scale * P^T (dlse * q), which is that attention's dv.
    """
    if _is_one_segment(q, k, cu_seqlens_q) and dlse is None:
        grads = _flash_backward(dout, q, k, v, out, lse, softmax_scale)
        return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for q_range, k_range in _segment_pairs(q, k, cu_seqlens_q, cu_seqlens_k):
        b_q, b_k, b_v = q[:, q_range], k[:, k_range], v[:, k_range]
        b_out, b_lse = out[:, q_range], lse[:, :, q_range]
        b_dq, b_dk, b_dv = _flash_backward(dout[:, q_range], b_q, b_k, b_v, b_out, b_lse, softmax_scale)
        if dlse is not None:
            weight = (softmax_scale * dlse[:, :, q_range]).transpose(1, 2).unsqueeze(-1)
            mean_k, same_lse, _ = _flash(b_q, b_k, b_k, softmax_scale)
            b_dq = b_dq + (weight * mean_k).to(q.dtype)
            weighted_q = (weight * b_q).to(q.dtype)
            b_dk = b_dk + _flash_backward(weighted_q, b_q, b_k, b_k, mean_k, same_lse, softmax_scale)[2]
        dq[:, q_range], dk[:, k_range], dv[:, k_range] = b_dq, b_dk, b_dv
    return dq, dk, dv


def _is_one_segment(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether the result is one flash call's, with nothing to copy into place."""
    return cu_seqlens is None and q.numel() > 0 and k.numel() > 0


def _segment_pairs(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> list[tuple[slice, slice]]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        pairs = [((0, q.shape[1]), (0, k.shape[1]))]
    else:
        pairs = list(zip(segments(cu_seqlens_q), segments(cu_seqlens_k), strict=True))
    # Segments with no query or no key keep what an empty sum gives: out 0, lse -inf, gradients 0. No batch and no head
    # is nothing to compute either, and the CPU kernel would divide by their number.
    if not q.numel() or not k.numel():
        return []
    return [(slice(*qs), slice(*ks)) for qs, ks in pairs if qs[1] > qs[0] and ks[1] > ks[0]]


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """out [B, S, H, D], lse [B, H, S], and what the CUDA backward wants besides."""
    heads = _heads_first(q, k, v)
    if q.device.type == "cuda":
        out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(*heads, 0.0, False, scale=scale)
        return out.transpose(1, 2), lse, tuple(rest)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, False, scale=scale)
    out = out.transpose(1, 2)
    if k.shape[1] < _SCALAR_KEYS:
        # A row of nothing but NaN came out as zeros; those of some NaN are right, and stay so.
        lost = torch.einsum("bshd,bthd->bhst", q, k).isnan().any(-1)
        lse = lse.masked_fill(lost, float("nan"))
        out = out.masked_fill(lost.transpose(1, 2).unsqueeze(-1), float("nan"))
    return out, lse, ()


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads = _heads_first(dout, q, k, v, out)
    if q.device.type == "cuda":
        no_seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *heads, lse, None, None, q.shape[1], k.shape[1], 0.0, False, no_seed, no_seed.new_empty(0), scale=scale
        )
    else:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads, lse, 0.0, False, scale=scale
        )
    dq, dk, dv = (g.transpose(1, 2) for g in grads)
    return dq, dk, dv
