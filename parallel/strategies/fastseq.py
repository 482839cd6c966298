"""FastSeq: gather the normed hidden states while projecting each rank's part to this rank's heads as it arrives.

Forward, in step s of P: project the chunk of rank r - s to this rank's slice of the heads, while the chunk of
r - s - 1 is in flight; then attention of whole sequences, and an all-to-all from heads back to tokens.
Backward: all-to-all of the output's gradient, attention backward, then for every chunk its share of dW (x gathered
again, chunk by chunk) while dX shares travel to their owners, who sum them in a fixed order: a reduce-scatter.

Sent per layer and rank, M = B S C elements: forward M (P - 1) / P + M (P - 1) / P^2 (gather x, o back); backward
2 M (P - 1) / P + M (P - 1) / P^2 (gather x again, dX shares, dO).
Source: Open-Sora, March 2024 (FastSeq), which overlaps for P = 2 only and leaves out the sum of dX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from longreel.kernels.reference import compute_dtype
from longreel.models.sequence import AttentionShape, SequenceLengths, Traffic
from longreel.parallel import comm
from longreel.parallel.strategies.base import SequenceGroup
from longreel.parallel.strategies.heads import attend, attend_backward, attend_flops, empty_results
from longreel.parallel.strategies.layout import gather_heads, pad_tokens, scatter_heads


def gather_project(x: Tensor, weight: Tensor, bias: Tensor | None, parts: int, num_heads: int, group: str) -> Tensor:
    """Projection of every rank's x [B, s, C] to this rank's heads: [B, P s, G, h, D], chunk by chunk on arrival.

    Args:
        weight: [G H D, C], rows ordered [G, H, D]. bias: [G H D] or None.
        parts: G.
    """
    size = comm.group_size(group)
    batch, s, channels = x.shape
    head_weight = _head_slice(weight, parts, num_heads, group)
    heads, head_dim = head_weight.shape[1:3]
    matrix = head_weight.reshape(-1, channels)
    offset = None if bias is None else _head_slice(bias, parts, num_heads, group).reshape(-1)
    y = x.new_empty(batch, size, s, parts * heads * head_dim)
    for owner, chunk in comm.ring_chunks(x, group):
        y[:, owner] = F.linear(chunk, matrix, offset)
    return y.view(batch, size * s, parts, heads, head_dim)


def gather_project_backward(
    dy: Tensor, x: Tensor, weight: Tensor, num_heads: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [B, s, C] summed over the ranks, and this rank's share of dweight and dbias (zero outside its heads).

    Args:
        dy: [B, P s, G, h, D], gradient of gather_project's result.
    """
    size, rank = comm.group_size(group), comm.group_rank(group)
    batch, s, channels = x.shape
    parts = dy.shape[2]
    by_owner = dy.reshape(batch, size, s, -1)
    matrix = _head_slice(weight, parts, num_heads, group).reshape(-1, channels)
    # Shares are summed in fp32: P roundings to half precision would lose what one device's GEMM keeps.
    dtype = compute_dtype(x.dtype)
    dmatrix = torch.zeros(matrix.shape, dtype=dtype, device=x.device)
    dx = (by_owner[:, rank] @ matrix).to(dtype)
    for step, (owner, chunk) in enumerate(comm.ring_chunks(x, group)):
        flight = None
        if step:
            share = by_owner[:, (rank + step) % size] @ matrix
            flight = comm.start_exchange(share, torch.empty_like(share), step=step, group=group)
        dmatrix += by_owner[:, owner].flatten(0, 1).t() @ chunk.flatten(0, 1)
        if flight is not None:
            dx += flight.wait()
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    _head_slice(dweight, parts, num_heads, group).copy_(dmatrix.view(*dy.shape[2:], channels))
    dbias = weight.new_zeros(weight.shape[0])
    _head_slice(dbias, parts, num_heads, group).copy_(dy.sum((0, 1), dtype=dtype))
    return dx.to(x.dtype), dweight, dbias


def _head_slice(value: Tensor, parts: int, num_heads: int, group: str) -> Tensor:
    """View of this rank's heads in rows ordered [G, H, D]: [G, h, D, ...]."""
    heads = num_heads // comm.group_size(group)
    return value.unflatten(0, (parts, num_heads, -1)).narrow(1, comm.group_rank(group) * heads, heads)


@torch.library.custom_op("longreel::fastseq_attention", mutates_args=())
def fastseq_attention_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    text: Tensor | None,
    kv_weight: Tensor | None,
    kv_bias: Tensor | None,
    num_heads: int,
    valid_q: int,
    valid_k: int,
    scale: float,
    provider: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gather and project, attend, exchange back.

    Args:
        x: [B, s, C]. weight, bias: [3 C, C] and [3 C] for self-attention, [C, C] and [C] with text.
        text, kv_weight, kv_bias: [B, l, C], [2 C, C] and [2 C] of a cross attention, or None.
        valid_q, valid_k: tokens of the whole sequences that exist.

    Returns:
        out [B, s, H, D], then what backward reuses: q_heads [B, P s, G, h, D], kv_heads, out_heads [B, valid_q, h, D]
        and lse [B, h, valid_q].
    """
    q_heads = gather_project(x, weight, bias, 3 if text is None else 1, num_heads, group)
    if text is None or kv_weight is None:
        kv_heads = x.new_empty(0)
    else:
        kv_heads = gather_project(text, kv_weight, kv_bias, 2, num_heads, group)
    out_heads, lse = attend(q_heads, kv_heads, valid_q, valid_k, scale, provider)
    out = gather_heads(out_heads.unsqueeze(2), group, rows=x.shape[1]).squeeze(2)
    return out, q_heads, kv_heads, out_heads, lse


@torch.library.custom_op("longreel::fastseq_attention_backward", mutates_args=())
def fastseq_attention_backward_op(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    text: Tensor | None,
    kv_weight: Tensor | None,
    q_heads: Tensor,
    kv_heads: Tensor,
    out_heads: Tensor,
    lse: Tensor,
    num_heads: int,
    valid_q: int,
    valid_k: int,
    scale: float,
    provider: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, then dtext, dkv_weight, dkv_bias (empty for self-attention)."""
    dout_heads = scatter_heads(dout.unsqueeze(2), group).squeeze(2)
    dq_heads, dkv_heads = attend_backward(
        dout_heads, q_heads, kv_heads, out_heads, lse, valid_q, valid_k, scale, provider
    )
    grads = gather_project_backward(pad_tokens(dq_heads, q_heads.shape[1]), x, weight, num_heads, group)
    if text is None or kv_weight is None:
        return *grads, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    dkv_heads = pad_tokens(dkv_heads, kv_heads.shape[1])
    return *grads, *gather_project_backward(dkv_heads, text, kv_weight, num_heads, group)


@fastseq_attention_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    text: Tensor | None,
    kv_weight: Tensor | None,
    kv_bias: Tensor | None,
    num_heads: int,
    valid_q: int,
    valid_k: int,
    scale: float,
    provider: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, s, _ = x.shape
    size = comm.group_size(group)
    head_dim = weight.shape[0] // (num_heads * (3 if text is None else 1))
    padded_k = None if text is None else size * text.shape[1]
    out = x.new_empty(batch, s, num_heads, head_dim)
    return out, *empty_results(x, batch, size * s, padded_k, num_heads // size, head_dim, valid_q)


@fastseq_attention_backward_op.register_fake
def _(
    dout: Tensor, x: Tensor, weight: Tensor, text: Tensor | None, kv_weight: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])
    if text is None or kv_weight is None:
        return *grads, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    text_grads = text.new_empty(text.shape), kv_weight.new_empty(kv_weight.shape)
    return *grads, *text_grads, kv_weight.new_empty(kv_weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, text, kv_weight, kv_bias, *ctx.rest = inputs
    ctx.has_bias, ctx.has_text, ctx.has_kv_bias = bias is not None, text is not None, kv_bias is not None
    ctx.save_for_backward(x, weight, text, kv_weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    # Zeros for the gradients of what backward reuses would be as large as q, k, v and o.
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, dw, db, dtext, dkv_w, dkv_b = fastseq_attention_backward_op(dout, *ctx.saved_tensors, *ctx.rest)
    grads = (
        dx,
        dw,
        db if ctx.has_bias else None,
        dtext if ctx.has_text else None,
        dkv_w if ctx.has_text else None,
        dkv_b if ctx.has_kv_bias else None,
    )
    return grads + (None,) * len(ctx.rest)


fastseq_attention_op.register_autograd(_grad, setup_context=_save)


def _projection_flops(x: Any, weight: Any, text: Any, kv_weight: Any, size: int) -> int:
    """FLOPs of projecting all tokens to this rank's heads, forward."""
    flops = 2 * x[0] * (size * x[1]) * (weight[0] // size) * weight[1]
    if text is not None:
        flops += 2 * text[0] * (size * text[1]) * (kv_weight[0] // size) * kv_weight[1]
    return flops


@register_flop_formula(torch.ops.longreel.fastseq_attention)
def _flops(
    x: Any,
    weight: Any,
    bias: Any,
    text: Any,
    kv_weight: Any,
    kv_bias: Any,
    num_heads: int,
    valid_q: int,
    valid_k: int,
    scale: float,
    provider: str,
    group: str,
    **_: Any,
) -> int:
    size = comm.group_size(group)
    head_dim = weight[0] // (num_heads * (3 if text is None else 1))
    attended = attend_flops(x[0], num_heads // size, head_dim, valid_q, valid_k, 2)
    return attended + _projection_flops(x, weight, text, kv_weight, size)


@register_flop_formula(torch.ops.longreel.fastseq_attention_backward)
def _backward_flops(
    dout: Any,
    x: Any,
    weight: Any,
    text: Any,
    kv_weight: Any,
    q_heads: Any,
    kv_heads: Any,
    out_heads: Any,
    lse: Any,
    num_heads: int,
    valid_q: int,
    valid_k: int,
    *_: Any,
    **__: Any,
) -> int:
    attended = attend_flops(q_heads[0], q_heads[3], q_heads[4], valid_q, valid_k, 5)
    return attended + 2 * _projection_flops(x, weight, text, kv_weight, num_heads // q_heads[3])


@dataclass(frozen=True, kw_only=True, slots=True)
class FastSeq(SequenceGroup):
    """Heads split over the ranks of a group, hidden states gathered instead of q, k, v exchanged."""

    def self_attention(self, x: Tensor, qkv: nn.Linear, *, num_heads: int, lengths: SequenceLengths) -> Tensor:
        """See longreel.models.sequence.SequenceParallel."""
        return self._attend(x, qkv, None, None, num_heads, lengths.valid, lengths.valid)

    def cross_attention(
        self,
        x: Tensor,
        text: Tensor,
        q: nn.Linear,
        kv: nn.Linear,
        *,
        num_heads: int,
        lengths: SequenceLengths,
        text_lengths: SequenceLengths,
    ) -> Tensor:
        """See longreel.models.sequence.SequenceParallel."""
        return self._attend(x, q, text, kv, num_heads, lengths.valid, text_lengths.valid)

    def _attend(
        self,
        x: Tensor,
        query: nn.Linear,
        text: Tensor | None,
        kv: nn.Linear | None,
        num_heads: int,
        valid_q: int,
        valid_k: int,
    ) -> Tensor:
        self.check_heads(num_heads)
        scale = (x.shape[-1] // num_heads) ** -0.5
        out, *_ = fastseq_attention_op(
            x,
            query.weight,
            query.bias,
            text,
            None if kv is None else kv.weight,
            None if kv is None else kv.bias,
            num_heads,
            valid_q,
            valid_k,
            scale,
            self.resolved_provider(x),
            self.group,
        )
        return out.flatten(2)

    def traffic(self, shape: AttentionShape) -> Traffic:
        """Gathered x (and text) and the exchange of o; backward gathers again and scatters the sum of dX."""
        away = self.degree - 1
        width = shape.batch * shape.num_heads * shape.head_dim * shape.element_size
        gathered = away * width * (self.rows(shape.seq_len) + self.rows(shape.kv_len or 0))
        exchanged = away * width * self.rows(shape.seq_len) // self.degree
        return Traffic(
            forward={"all_gather": gathered, "all_to_all": exchanged},
            backward={"all_gather": gathered, "all_to_all": exchanged, "reduce_scatter": gathered},
        )
