"""Partial attention outputs merged by their log-sum-exp, as a custom op: longreel::merge_attention.

out = w1 out1 + w2 out2 with w1 = sigmoid(lse1 - lse2) and w2 = sigmoid(lse2 - lse1); lse = max + log1p(exp(-|lse1 -
lse2|)). No lse is exponentiated. A side with lse = -inf saw no key and weighs 0; where neither did, out = 0, lse = -inf
and every gradient is 0. Differentiable in outputs and lses: merged with a constant lse, dQ and dK would be wrong.
Shapes: out [B, S, H, D]; lse [B, H, S] in fp32 (fp64 for fp64 outputs). Bytes moved, n = B S H D elements of e bytes,
without the lses: 3 n e forward, 5 n e backward.
Source: Dao et al. 2022, FlashAttention (arXiv:2205.14135), algebra of the blockwise softmax.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longreel.kernels import reference
from longreel.kernels.checks import check_shape, check_tensor
from longreel.kernels.memory_bound import count_no_flops
from longreel.kernels.pointwise import resolve_pointwise_provider


def _implementation(provider: str) -> ModuleType:
    if provider == "triton":
        from longreel.kernels import triton_lse_merge

        return triton_lse_merge
    return reference


@torch.library.custom_op("longreel::merge_attention", mutates_args=())
def merge_attention_op(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, provider: str) -> tuple[Tensor, Tensor]:
    """Forward op; see merge_attention()."""
    return _implementation(provider).merge_attention_fwd(out1, lse1, out2, lse2)


@torch.library.custom_op("longreel::merge_attention_backward", mutates_args=())
def merge_attention_backward_op(
    dout: Tensor, dlse: Tensor | None, out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, provider: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward op: (dout1, dlse1, dout2, dlse2), contiguous."""
    return _implementation(provider).merge_attention_bwd(dout, dlse, out1, lse1, out2, lse2)


@merge_attention_op.register_fake
def _(out1: Tensor, lse1: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return out1.new_empty(out1.shape), lse1.new_empty(lse1.shape)


@merge_attention_backward_op.register_fake
def _(dout: Tensor, dlse: Tensor | None, out1: Tensor, lse1: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout1, dout2 = (out1.new_empty(out1.shape) for _ in range(2))
    dlse1, dlse2 = (lse1.new_empty(lse1.shape) for _ in range(2))
    return dout1, dlse1, dout2, dlse2


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.provider = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        dout = torch.zeros_like(ctx.saved_tensors[0])
    return *merge_attention_backward_op(dout, dlse, *ctx.saved_tensors, ctx.provider), None


merge_attention_op.register_autograd(_grad, setup_context=_save)


count_no_flops(merge_attention_op, merge_attention_backward_op)


def merge_attention(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, *, provider: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention of the same queries over each of them.

    Args:
        out1, out2: [B, S, H, D], of one dtype.
        lse1, lse2: [B, H, S], fp32 (fp64 for fp64 outputs); -inf where a query saw no key.
        provider: see resolve_pointwise_provider.

    Returns:
        out [B, S, H, D] in out1's dtype and lse [B, H, S]; both differentiable.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes or devices that do not fit, or a provider that cannot run.
    """
    check_tensor("out1", out1, "[B, S, H, D]")
    check_shape("out2", out2, "out1", out1)
    batch, seq_len, heads, _ = out1.shape
    dtype = reference.compute_dtype(out1.dtype)
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        check_tensor(name, lse)
        if list(lse.shape) != [batch, heads, seq_len] or lse.dtype != dtype or lse.device != out1.device:
            raise ValueError(
                f"{name} must be [{batch}, {heads}, {seq_len}] in {dtype} on {out1.device} for out1 "
                f"{list(out1.shape)}, got {list(lse.shape)} in {lse.dtype} on {lse.device}"
            )
    return merge_attention_op(out1, lse1, out2, lse2, resolve_pointwise_provider(provider, out1))
