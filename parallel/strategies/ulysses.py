"""Ulysses: all-to-all from tokens to heads, attention of whole sequences, all-to-all back.

Sent per layer and rank, M = B S C elements: q, k, v in and o out, 4 M (P - 1) / P^2 forward and as much backward.
Source: Jacobs et al. 2023, DeepSpeed Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from longreel.models.sequence import AttentionShape, SequenceLengths, Traffic
from longreel.parallel import comm
from longreel.parallel.strategies.base import SequenceGroup
from longreel.parallel.strategies.heads import attend, attend_backward, attend_flops, empty_results
from longreel.parallel.strategies.layout import gather_heads, pad_tokens, scatter_heads


@torch.library.custom_op("longreel::ulysses_attention", mutates_args=())
def ulysses_attention_op(
    q: Tensor, kv: Tensor | None, valid_q: int, valid_k: int, scale: float, provider: str, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Exchange, attend, exchange back.

    Args:
        q: [B, s, 3, H, D] (q, k, v of self-attention, one exchange), or [B, s, 1, H, D] with kv.
        kv: [B, l, 2, H, D] of a cross attention, or None.
        valid_q, valid_k: tokens of the whole sequences that exist.

    Returns:
        out [B, s, H, D], then what backward reuses: q_heads [B, S, G, h, D], kv_heads, out_heads [B, valid_q, h, D]
        and lse [B, h, valid_q].
    """
    q_heads = scatter_heads(q, group)
    kv_heads = q.new_empty(0) if kv is None else scatter_heads(kv, group)
    out_heads, lse = attend(q_heads, kv_heads, valid_q, valid_k, scale, provider)
    out = gather_heads(pad_tokens(out_heads, q_heads.shape[1]).unsqueeze(2), group).squeeze(2)
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
) -> tuple[Tensor, Tensor]:
    """dq [B, s, G, H, D] and dkv [B, l, 2, H, D] (empty for self-attention)."""
    dout_heads = scatter_heads(dout.unsqueeze(2), group).squeeze(2)
    dq_heads, dkv_heads = attend_backward(
        dout_heads, q_heads, kv_heads, out_heads, lse, valid_q, valid_k, scale, provider
    )
    dq = gather_heads(dq_heads, group)
    return dq, gather_heads(dkv_heads, group) if kv_heads.numel() else kv_heads.new_empty(0)


@ulysses_attention_op.register_fake
def _(
    q: Tensor, kv: Tensor | None, valid_q: int, valid_k: int, scale: float, provider: str, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, s, _, heads, head_dim = q.shape
    size = comm.group_size(group)
    padded_k = None if kv is None else size * kv.shape[1]
    out = q.new_empty(batch, s, heads, head_dim)
    return out, *empty_results(q, batch, size * s, padded_k, heads // size, head_dim, valid_q)


@ulysses_attention_backward_op.register_fake
def _(
    dout: Tensor, q_heads: Tensor, kv_heads: Tensor, out_heads: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    batch, s, heads, head_dim = dout.shape
    dq = q_heads.new_empty(batch, s, q_heads.shape[2], heads, head_dim)
    if not kv_heads.numel():
        return dq, kv_heads.new_empty(0)
    return dq, kv_heads.new_empty(batch, kv_heads.shape[1] // comm.group_size(rest[-1]), 2, heads, head_dim)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, kv, *ctx.rest = inputs
    ctx.has_kv = kv is not None
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    # Zeros for the gradients of what backward reuses would be as large as q, k, v and o.
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dq, dkv = ulysses_attention_backward_op(dout, *ctx.saved_tensors, *ctx.rest)
    return dq, dkv if ctx.has_kv else None, None, None, None, None, None


ulysses_attention_op.register_autograd(_grad, setup_context=_save)


@register_flop_formula(torch.ops.longreel.ulysses_attention)
def _flops(q: Any, kv: Any, valid_q: int, valid_k: int, scale: float, provider: str, group: str, **_: Any) -> int:
    return attend_flops(q[0], q[3] // comm.group_size(group), q[4], valid_q, valid_k, 2)


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
        projected = qkv(x).unflatten(-1, (3, num_heads, -1))
        return self._attend(projected, None, lengths.valid, lengths.valid)

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
        q_tokens = q(x).unflatten(-1, (1, num_heads, -1))
        kv_tokens = kv(text).unflatten(-1, (2, num_heads, -1))
        return self._attend(q_tokens, kv_tokens, lengths.valid, text_lengths.valid)

    def _attend(self, q: Tensor, kv: Tensor | None, valid_q: int, valid_k: int) -> Tensor:
        self.check_heads(q.shape[3])
        scale = q.shape[-1] ** -0.5
        out, *_ = ulysses_attention_op(q, kv, valid_q, valid_k, scale, self.resolved_provider(q), self.group)
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
