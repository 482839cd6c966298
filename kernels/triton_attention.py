"""Triton attention, launched: forward (out, lse), backward (dq, dk, dv), and a backward that writes one dqkv.

The backward is deterministic; triton_attention_atomic has the other one.
Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longreel.kernels.checks import check_triton_dtype
from longreel.kernels.triton_attention_plan import plan_backward, plan_forward
from longreel.kernels.triton_common import launch_on


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As reference.attention_fwd; one kernel.

    Raises:
        ValueError: a dtype the kernels do not compute in.
    """
    check_triton_dtype("q", q.dtype)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    with launch_on(q):
        plan_forward(q, k, v, out, lse, softmax_scale, cu_seqlens_q, cu_seqlens_k).run()
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
    """As reference.attention_bwd; three kernels, deterministic.

    Raises:
        ValueError: a dtype the kernels do not compute in.
    """
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    backward_into(grads, dout, dlse, (q, k, v), out, lse, softmax_scale, cu_seqlens_q, cu_seqlens_k)
    return grads


def attention_packed_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """dqkv [B, S, 3, H, D]: the kernels write into its three slices, nothing is copied.

    Raises:
        ValueError: a dtype the kernels do not compute in.
    """
    dqkv = qkv.new_empty(qkv.shape)
    backward_into(dqkv.unbind(2), dout, dlse, qkv.unbind(2), out, lse, softmax_scale, cu_seqlens, cu_seqlens)
    return dqkv


def backward_into(
    grads: Sequence[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    qkv: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *,
    atomic: bool = False,
) -> None:
    """Fill the gradients of q, k and v, strided as they are.

    Args:
        grads: of q, k and v, with the last dim contiguous.
        atomic: dq by atomic additions into a workspace of 4 bytes an element of q.

    Raises:
        ValueError: a dtype the kernels do not compute in.
    """
    check_triton_dtype("q", out.dtype)
    # The gradient of a sum arrives expanded from one element.
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    # Heads first: the rows of a tile are neighbours, a constant apart.
    dq_sum = out.new_zeros(out.transpose(1, 2).shape, dtype=torch.float32) if atomic else None
    arguments = dout, dlse, qkv, out, lse, softmax_scale, cu_seqlens_q, cu_seqlens_k
    with launch_on(out):
        for launch in plan_backward(grads, *arguments, dq_sum):
            launch.run()
        if dq_sum is not None:
            grads[0].copy_(dq_sum.transpose(1, 2).mul_(softmax_scale))
