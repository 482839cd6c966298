"""Ulysses: all-to-all from tokens to heads, attention of whole sequences, all-to-all back.

The projections run without their biases: these are added, and their gradients summed, in the passes that lay the
tokens out for the exchange (longreel.kernels.sp_layout).

Sent per layer and rank, M = B S C elements: q, k, v in and o out, 4 M (P - 1) / P^2 forward and as much backward.
Source: Jacobs et al. 2023, DeepSpeed Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from longreel.models.sequence import AttentionShape, SequenceLengths, Traffic
from longreel.parallel import comm
from longreel.parallel.strategies.base import SequenceGroup
from longreel.parallel.strategies.heads import attend, attend_backward, attend_flops, empty_results
from longreel.parallel.strategies.layout import gather_heads, scatter_heads, scatter_heads_backward


@torch.library.custom_op("longreel::ulysses_attention", mutates_args=())
def ulysses_attention_op(
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor | None,
    kv_bias: Tensor | None,
    valid_q: int,
    valid_k: int,
    scale: float,
    provider: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Exchange, attend, exchange back.

    Args:
        q: [B, s, 3, H, D] (q, k, v of self-attention, one exchange), or [B, s, 1, H, D] with kv.
        q_bias: [3 H D] or [H D], added to q on its way into the exchange, or None.
        kv, kv_bias: [B, l, 2, H, D] of a cross attention and [2 H D], or None.
        valid_q, valid_k: tokens of the whole sequences that exist.

    Returns:
        out [B, s, H, D], then what backward reuses: q_heads [B, S, G, h, D], kv_heads, out_heads [B, valid_q, h, D]
        and lse [B, h, valid_q].
    """
    q_heads = scatter_heads(q, group, q_bias)
    kv_heads = q.new_empty(0) if kv is None else scatter_heads(kv, group, kv_bias)
    out_heads, lse = attend(q_heads, kv_heads, valid_q, valid_k, scale, provider)
    out = gather_heads(out_heads.unsqueeze(2), group, rows=q.shape[1]).squeeze(2)
    return out, q_heads, kv_heads, out_heads, lse


@torch.library.custom_op("longreel::ulysses_attention_backward", mutates_args=())
def ulysses_attention_backward_op(
    dout: Tensor,
    q_heads: Tensor,
    kv_heads: Tensor,
    out_heads: Tensor,
    lse: Tensor,
    valid_q: int,
    valid_k: int,
    scale: float,
    provider: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq [B, s, G, H, D], dq_bias [G H D], dkv [B, l, 2, H, D] and dkv_bias (both empty for self-attention)."""
    dout_heads = scatter_heads(dout.unsqueeze(2), group).squeeze(2)
    dq_heads, dkv_heads = attend_backward(
        dout_heads, q_heads, kv_heads, out_heads, lse, valid_q, valid_k, scale, provider
    )
    dq, dq_bias = scatter_heads_backward(dq_heads, group, dout.shape[1])
    if not kv_heads.numel():
        return dq, dq_bias, kv_heads.new_empty(0), kv_heads.new_empty(0)
    rows = kv_heads.shape[1] // comm.group_size(group)
    return dq, dq_bias, *scatter_heads_backward(dkv_heads, group, rows)


@ulysses_attention_op.register_fake
def _(
    q: Tensor, q_bias: Tensor | None, kv: Tensor | None, kv_bias: Tensor | None, valid_q: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, s, _, heads, head_dim = q.shape
    size = comm.group_size(rest[-1])
    padded_k = None if kv is None else size * kv.shape[1]
    out = q.new_empty(batch, s, heads, head_dim)
    return out, *empty_results(q, batch, size * s, padded_k, heads // size, head_dim, valid_q)


@ulysses_attention_backward_op.register_fake
def _(
    dout: Tensor, q_heads: Tensor, kv_heads: Tensor, out_heads: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, s, heads, head_dim = dout.shape
    parts = q_heads.shape[2]
    dq = q_heads.new_empty(batch, s, parts, heads, head_dim)
    dq_bias = q_heads.new_empty(parts * heads * head_dim)
    if not kv_heads.numel():
        return dq, dq_bias, kv_heads.new_empty(0), kv_heads.new_empty(0)
    dkv = kv_heads.new_empty(batch, kv_heads.shape[1] // comm.group_size(rest[-1]), 2, heads, head_dim)
    return dq, dq_bias, dkv, kv_heads.new_empty(2 * heads * head_dim)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.valid_q, ctx.valid_k, ctx.scale, ctx.provider, ctx.group = inputs
    ctx.given = [tensor is not None for tensor in tensors]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    # Zeros for the gradients of what backward reuses would be as large as q, k, v and o.
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    rest = (ctx.valid_q, ctx.valid_k, ctx.scale, ctx.provider, ctx.group)
    grads = ulysses_attention_backward_op(dout, *ctx.saved_tensors, *rest)
    wanted = [grad if given else None for grad, given in zip(grads, ctx.given, strict=True)]
    return *wanted, None, None, None, None, None


ulysses_attention_op.register_autograd(_grad, setup_context=_save)


@register_flop_formula(torch.ops.longreel.ulysses_attention)
def _flops(q: Any, q_bias: Any, kv: Any, kv_bias: Any, valid_q: int, valid_k: int, *rest: Any, **_: Any) -> int:
    return attend_flops(q[0], q[3] // comm.group_size(rest[-1]), q[4], valid_q, valid_k, 2)


@register_flop_formula(torch.ops.longreel.ulysses_attention_backward)
def _backward_flops(
    dout: Any, q_heads: Any, kv: Any, out: Any, lse: Any, valid_q: int, valid_k: int, *_: Any, **__: Any
) -> int:
    return attend_flops(q_heads[0], q_heads[3], q_heads[4], valid_q, valid_k, 5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ulysses(SequenceGroup):
    """Heads split over the ranks of a group; the Ulysses degree must divide the number of heads."""

    def self_attention(self, x: Tensor, qkv: nn.Linear, *, num_heads: int, lengths: SequenceLengths) -> Tensor:
        """See longreel.models.sequence.SequenceParallel."""
        projected = F.linear(x, qkv.weight).unflatten(-1, (3, num_heads, -1))
        return self._attend(projected, qkv.bias, None, None, lengths.valid, lengths.valid)

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
        q_tokens = F.linear(x, q.weight).unflatten(-1, (1, num_heads, -1))
        kv_tokens = F.linear(text, kv.weight).unflatten(-1, (2, num_heads, -1))
        return self._attend(q_tokens, q.bias, kv_tokens, kv.bias, lengths.valid, text_lengths.valid)

    def _attend(
        self,
        q: Tensor,
        q_bias: Tensor | None,
        kv: Tensor | None,
        kv_bias: Tensor | None,
        valid_q: int,
        valid_k: int,
    ) -> Tensor:
        self.check_heads(q.shape[3])
        scale = q.shape[-1] ** -0.5
        provider = self.resolved_provider(q)
        out, *_ = ulysses_attention_op(q, q_bias, kv, kv_bias, valid_q, valid_k, scale, provider, self.group)
        return out.flatten(2)

    def traffic(self, shape: AttentionShape) -> Traffic:
        """Self-attention: q, k, v and o; cross attention: q and o of the tokens, k and v of the text."""
        away = self.degree - 1
        rows, width = self.rows(shape.seq_len), shape.num_heads * shape.head_dim
        elements = (4 if shape.kv_len is None else 2) * rows
        if shape.kv_len is not None:
            elements += 2 * self.rows(shape.kv_len)
        sent = shape.batch * elements * width * away // self.degree * shape.element_size
        return Traffic(forward={"all_to_all": sent}, backward={"all_to_all": sent})
