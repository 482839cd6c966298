"""Attention with heads split over one group and keys going round another: the op of Ulysses, ring and USP.

Heads are split by all-to-all over `heads_group` (U ranks), keys and values then go round `ring_group` (R ranks); an
empty name leaves that half out. A rank's place among the P = U R is ring_rank * U + heads_rank, so that the U parts
that meet in an all-to-all are consecutive tokens.
Lengths are cu_seqlens on the host: [0, S], or the ends of packed clips (segments.py).
An absent tensor inside an op is an empty one: op outputs cannot be optional.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longreel.kernels.reference import compute_dtype
from longreel.parallel import comm
from longreel.parallel.strategies.head_exchange import ToHeads, ToTokens
from longreel.parallel.strategies.heads import attend, attend_backward, attend_flops
from longreel.parallel.strategies.layout import pad_tokens
from longreel.parallel.strategies.ring import ring_attend, ring_attend_backward
from longreel.parallel.strategies.segments import part_offsets


def _size(group: str) -> int:
    return comm.group_size(group) if group else 1


def _ring_part(offsets: Sequence[int], rows: int, ring_group: str) -> Sequence[int]:
    """Offsets among the existing tokens of this rank's ring part of `rows`; all of them without a ring."""
    return part_offsets(offsets, rows, comm.group_rank(ring_group)) if ring_group else offsets


def _attend(
    q_heads: Tensor,
    kv_heads: Tensor,
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    scale: float,
    provider: str,
    ring_group: str,
) -> tuple[Tensor, Tensor]:
    if not ring_group:
        return attend(q_heads, kv_heads, offsets_q, offsets_k, scale, provider)
    own = _ring_part(offsets_q, q_heads.shape[1], ring_group)
    kv = q_heads[:, :, 1:] if q_heads.shape[2] == 3 else kv_heads
    return ring_attend(q_heads[:, : own[-1], 0], kv, own, offsets_k, scale, provider, ring_group)


def _attend_backward(
    dout_heads: Tensor,
    q_heads: Tensor,
    kv_heads: Tensor,
    out_heads: Tensor,
    lse: Tensor,
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    scale: float,
    provider: str,
    ring_group: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of q_heads and kv_heads; rows beyond the existing ones may be left out."""
    if not ring_group:
        return attend_backward(dout_heads, q_heads, kv_heads, out_heads, lse, offsets_q, offsets_k, scale, provider)
    padded = q_heads.shape[1]
    own = _ring_part(offsets_q, padded, ring_group)
    packed = q_heads.shape[2] == 3
    kv = q_heads[:, :, 1:] if packed else kv_heads
    queries, dout_queries = q_heads[:, : own[-1], 0], dout_heads[:, : own[-1]]
    dq, dkv = ring_attend_backward(
        dout_queries, queries, kv, out_heads, lse, own, offsets_k, scale, provider, ring_group
    )
    if packed:
        return torch.cat((pad_tokens(dq, padded).unsqueeze(2), dkv), dim=2), kv_heads
    return dq.unsqueeze(2), dkv


@torch.library.custom_op("longreel::exchange_attention", mutates_args=())
def exchange_attention_op(
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor | None,
    kv_bias: Tensor | None,
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    scale: float,
    provider: str,
    heads_group: str,
    ring_group: str,
    lean: bool,
    chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Exchange, attend, exchange back.

    Args:
        q: [B, s, 3, H, D] (q, k, v of self-attention, one exchange), or [B, s, 1, H, D] with kv.
        q_bias: [3 H D] or [H D], added to q on its way into the exchange, or None.
        kv, kv_bias: [B, l, 2, H, D] of a cross attention and [2 H D], or None.
        offsets_q, offsets_k: cu_seqlens of the whole sequences; [0, S] if they are not packed.
        heads_group, ring_group: names of the process groups, "" for none.
        lean: return out and lse alone; backward exchanges q, k, v and out again.
        chunks: K, parts that this rank's h heads are exchanged and attended in (head_exchange.py); K divides h.

    Returns:
        out [B, s, H, D] and lse [K, B, h / K, n] of the n existing queries of this rank's heads; then, unless lean,
        what backward reuses: q_heads [K, B, U s, G, h / K, D], kv_heads and out_heads [K, B, n, h / K, D].
    """
    q_in = ToHeads(q, q_bias, heads_group, chunks, keep=not lean)
    kv_in = None if kv is None else ToHeads(kv, kv_bias, heads_group, chunks, keep=not lean)
    back = ToTokens(q.shape[1], heads_group, chunks)
    outs, lses = [], []
    absent = q.new_empty(0)
    for _ in range(chunks):
        q_heads, kv_heads = q_in.wait(), kv_in.wait() if kv_in else absent
        out_heads, lse = _attend(q_heads, kv_heads, offsets_q, offsets_k, scale, provider, ring_group)
        back.send(out_heads.unsqueeze(2))
        lses.append(lse)
        if not lean:
            outs.append(out_heads)
        # Not held while the next chunk is laid out.
        del q_heads, kv_heads, out_heads
    saved = (absent, q.new_empty(0), q.new_empty(0))
    if not lean:
        saved = q_in.stacked(), kv_in.stacked() if kv_in else absent, _stack(outs)
    # What is not saved is let go before the result is laid out.
    del q_in, kv_in, outs
    return back.tokens().squeeze(2), _stack(lses), *saved


def _stack(chunks: list[Tensor]) -> Tensor:
    """torch.stack, without a copy of a single one."""
    return chunks[0].unsqueeze(0) if len(chunks) == 1 else torch.stack(chunks)


@torch.library.custom_op("longreel::exchange_attention_backward", mutates_args=())
def exchange_attention_backward_op(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor | None,
    kv_bias: Tensor | None,
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    scale: float,
    provider: str,
    heads_group: str,
    ring_group: str,
    lean: bool,
    chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq [B, s, G, H, D], dq_bias [G H D], dkv [B, l, 2, H, D] and dkv_bias (both empty for self-attention).

    Args:
        out, q, kv: lean: those of the forward op; else its out_heads, q_heads and kv_heads (empty for None).
    """
    rows, absent = dout.shape[1], q.new_empty(0)
    q_in = kv_in = None
    if lean:
        # Backward needs what left: out goes with its gradient, q, k and v go again.
        q_in = ToHeads(q, q_bias, heads_group, chunks)
        kv_in = None if kv is None else ToHeads(kv, kv_bias, heads_group, chunks)
    dout_in = ToHeads((dout, out) if lean and heads_group else dout.unsqueeze(2), None, heads_group, chunks)
    dq_back = ToTokens(rows, heads_group, chunks)
    dkv_back: ToTokens | None = None
    for chunk in range(chunks):
        received, chunk_lse = dout_in.wait(), lse[chunk]
        if q_in is not None:
            q_heads, kv_heads = q_in.wait(), kv_in.wait() if kv_in else absent
            out_heads = (received[:, :, 1] if heads_group else out)[:, : chunk_lse.shape[2]]
        else:
            assert kv is not None
            q_heads, kv_heads, out_heads = q[chunk], kv[chunk] if kv.numel() else absent, out[chunk]
        dq, dkv = _attend_backward(
            received[:, :, 0],
            q_heads,
            kv_heads,
            out_heads,
            chunk_lse,
            offsets_q,
            offsets_k,
            scale,
            provider,
            ring_group,
        )
        kv_rows = kv_heads.shape[1] if kv_heads.numel() else 0
        # Not held while gradients return and the next chunk is laid out.
        del received, q_heads, kv_heads, out_heads
        dq_back.send(dq)
        if kv_rows:
            dkv_back = dkv_back or ToTokens(kv_rows // _size(heads_group), heads_group, chunks)
            dkv_back.send(dkv)
        del dq, dkv
    del q_in, kv_in, dout_in
    if dkv_back is None:
        return *dq_back.tokens_and_bias(), absent, q.new_empty(0)
    return *dq_back.tokens_and_bias(), *dkv_back.tokens_and_bias()


@exchange_attention_op.register_fake
def _(
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor | None,
    kv_bias: Tensor | None,
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    scale: float,
    provider: str,
    heads_group: str,
    ring_group: str,
    lean: bool,
    chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, s, parts, num_heads, head_dim = q.shape
    size = _size(heads_group)
    heads = num_heads // size // chunks
    n = _ring_part(offsets_q, size * s, ring_group)[-1]
    out = q.new_empty(batch, s, num_heads, head_dim)
    lse = q.new_empty(chunks, batch, heads, n, dtype=compute_dtype(q.dtype))
    if lean:
        return out, lse, q.new_empty(0), q.new_empty(0), q.new_empty(0)
    q_heads = q.new_empty(chunks, batch, size * s, parts, heads, head_dim)
    kv_heads = q.new_empty(0) if kv is None else q.new_empty(chunks, batch, size * kv.shape[1], 2, heads, head_dim)
    return out, lse, q_heads, kv_heads, q.new_empty(chunks, batch, n, heads, head_dim)


@exchange_attention_backward_op.register_fake
def _(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, s, heads, head_dim = dout.shape
    *_, heads_group, _, lean, _ = rest
    parts = q.shape[2 if lean else 3]
    dq, dq_bias = q.new_empty(batch, s, parts, heads, head_dim), q.new_empty(parts * heads * head_dim)
    if kv is None or not kv.numel():
        return dq, dq_bias, q.new_empty(0), q.new_empty(0)
    rows = kv.shape[1] if lean else kv.shape[2] // _size(heads_group)
    return dq, dq_bias, q.new_empty(batch, rows, 2, heads, head_dim), q.new_empty(2 * heads * head_dim)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        *tensors,
        ctx.offsets_q,
        ctx.offsets_k,
        ctx.scale,
        ctx.provider,
        ctx.heads_group,
        ctx.ring_group,
        ctx.lean,
        ctx.chunks,
    ) = inputs
    ctx.given = [tensor is not None for tensor in tensors]
    out, lse, q_heads, kv_heads, out_heads = output
    q, q_bias, kv, kv_bias = tensors
    if ctx.lean:
        ctx.save_for_backward(out, lse, q, q_bias, kv, kv_bias)
    else:
        ctx.save_for_backward(out_heads, lse, q_heads, None, kv_heads, None)
    ctx.mark_non_differentiable(*output[1:])
    # Zeros for the gradients of what backward reuses would be as large as q, k, v and o.
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    rest = (
        ctx.offsets_q,
        ctx.offsets_k,
        ctx.scale,
        ctx.provider,
        ctx.heads_group,
        ctx.ring_group,
        ctx.lean,
        ctx.chunks,
    )
    grads = exchange_attention_backward_op(dout, *ctx.saved_tensors, *rest)
    wanted = [grad if given else None for grad, given in zip(grads, ctx.given, strict=True)]
    return *wanted, *(None for _ in rest)


exchange_attention_op.register_autograd(_grad, setup_context=_save)


@register_flop_formula(torch.ops.longreel.exchange_attention)
def _flops(q: Any, q_bias: Any, kv: Any, kv_bias: Any, offsets_q: Any, offsets_k: Any, *rest: Any, **_: Any) -> int:
    heads_group, ring_group = rest[2:4]
    size = _size(heads_group)
    own = _ring_part(offsets_q, size * q[1], ring_group)
    return attend_flops(q[0], q[3] // size, q[4], own, offsets_k, 2)


@register_flop_formula(torch.ops.longreel.exchange_attention_backward)
def _backward_flops(dout: Any, out: Any, lse: Any, *rest: Any, **_: Any) -> int:
    offsets_q, offsets_k, _, _, heads_group, ring_group = rest[4:10]
    own = _ring_part(offsets_q, _size(heads_group) * dout[1], ring_group)
    chunks, batch, heads, _ = lse
    return attend_flops(batch, chunks * heads, dout[3], own, offsets_k, 5)
