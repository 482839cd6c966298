"""FastSeq's attention layer, from hidden states to the attention's output, as one op forward and one backward.

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
from longreel.parallel.strategies.chunked_attention import gather_project_attend
from longreel.parallel.strategies.chunked_backward import attend_project_backward
from longreel.parallel.strategies.gather_project import gather_project, gather_project_backward, own_heads
from longreel.parallel.strategies.heads import attend, attend_backward, attend_flops
from longreel.parallel.strategies.layout import gather_heads, pad_tokens, scatter_heads

# Assumed: what the fp32 sums of a backward by chunks may take where memory is what the policy saves.
LEAN_SUMS_BYTES = 1 << 30
# From so many ranks on it is predicted to gain there: two hide too little behind its additional kernels.
LEAN_MIN_RANKS = 3


@torch.library.custom_op("longreel::fastseq_attention", mutates_args=())
def fastseq_attention_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    text: Tensor | None,
    kv_weight: Tensor | None,
    kv_bias: Tensor | None,
    num_heads: int,
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    scale: float,
    provider: str,
    group: str,
    lean: bool,
    chunked: bool,
    keep_gathered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gather and project, attend, exchange back.

    Args:
        x: [B, s, C]. weight, bias: [3 C, C] and [3 C] for self-attention, [C, C] and [C] with text.
        text, kv_weight, kv_bias: [B, l, C], [2 C, C] and [2 C] of a cross attention, or None.
        offsets_q, offsets_k: cu_seqlens of the whole sequences, on the host; [0, S] if they are not packed.
        lean: return out and lse alone; backward gathers and projects again.
        chunked: self-attention starts on the chunks that are there (see chunked_attention.py).
        keep_gathered: return every rank's x too, so that backward does not gather it again (nor text, if any, does).

    Returns:
        out [B, s, H, D] and lse [B, h, S]; then, unless lean, what backward reuses: q_heads [B, P s, G, h, D],
        kv_heads and out_heads [B, S, h, D]; then with keep_gathered x of every rank, [P, B, s, C].
    """
    gathered = x.new_empty(comm.group_size(group), *x.shape) if keep_gathered else None
    if chunked:
        heads = num_heads // comm.group_size(group)
        own_weight, own_bias = own_heads(weight, bias, 3, num_heads, group)
        q_heads, out_heads, lse = gather_project_attend(
            x, own_weight, own_bias, heads, offsets_q, scale, provider, group, keep_qkv=not lean, gathered=gathered
        )
        kv_heads = x.new_empty(0)
    else:
        q_heads, kv_heads = _project_all(x, weight, bias, text, kv_weight, kv_bias, num_heads, group, gathered)
        out_heads, lse = attend(q_heads, kv_heads, offsets_q, offsets_k, scale, provider)
    out = gather_heads(out_heads.unsqueeze(2), group, rows=x.shape[1]).squeeze(2)
    kept = x.new_empty(0) if gathered is None else gathered
    if lean:
        return out, lse, x.new_empty(0), x.new_empty(0), x.new_empty(0), kept
    return out, lse, q_heads, kv_heads, out_heads, kept


def _project_all(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    text: Tensor | None,
    kv_weight: Tensor | None,
    kv_bias: Tensor | None,
    num_heads: int,
    group: str,
    gathered: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q_heads and kv_heads (empty for self-attention)."""
    q_heads = gather_project(x, weight, bias, 3 if text is None else 1, num_heads, group, gathered=gathered)
    if text is None or kv_weight is None:
        return q_heads, x.new_empty(0)
    return q_heads, gather_project(text, kv_weight, kv_bias, 2, num_heads, group)


@torch.library.custom_op("longreel::fastseq_attention_backward", mutates_args=())
def fastseq_attention_backward_op(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q_heads: Tensor | None,
    kv_heads: Tensor | None,
    gathered: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    text: Tensor | None,
    kv_weight: Tensor | None,
    kv_bias: Tensor | None,
    num_heads: int,
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    scale: float,
    provider: str,
    group: str,
    chunked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, then dtext, dkv_weight, dkv_bias (empty for self-attention).

    Args:
        out: the forward op's out_heads; its out when q_heads and kv_heads are None, as after a lean forward.
        gathered: every rank's x, where the forward op kept it.
        chunked: as of the forward op; dX shares then leave as soon as a chunk's gradients are complete.
    """
    if q_heads is None or kv_heads is None:
        q_heads, kv_heads = _project_all(x, weight, bias, text, kv_weight, kv_bias, num_heads, group)
        both = scatter_heads(torch.stack((dout, out), dim=2), group)
        dout_heads, out_heads = both[:, :, 0], both[:, : offsets_q[-1], 1]
        del both
    else:
        out_heads = out
        dout_heads = scatter_heads(dout.unsqueeze(2), group).squeeze(2)
    if chunked:
        grads = attend_project_backward(
            dout_heads,
            q_heads,
            out_heads,
            lse,
            x,
            weight,
            num_heads,
            offsets_q,
            scale,
            provider,
            group,
            gathered=gathered,
        )
        return *grads, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    dq_heads, dkv_heads = attend_backward(
        dout_heads, q_heads, kv_heads, out_heads, lse, offsets_q, offsets_k, scale, provider
    )
    dq_heads = pad_tokens(dq_heads, q_heads.shape[1])
    if text is not None:
        dkv_heads = pad_tokens(dkv_heads, kv_heads.shape[1])
    # What was gathered and exchanged again goes before chunks of x come once more.
    del q_heads, kv_heads, dout_heads, out_heads
    grads = gather_project_backward(dq_heads, x, weight, num_heads, group, gathered=gathered)
    if text is None or kv_weight is None:
        return *grads, x.new_empty(0), x.new_empty(0), x.new_empty(0)
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
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    scale: float,
    provider: str,
    group: str,
    lean: bool,
    chunked: bool,
    keep_gathered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, s, _ = x.shape
    size = comm.group_size(group)
    head_dim = weight.shape[0] // (num_heads * (3 if text is None else 1))
    heads = num_heads // size
    out = x.new_empty(batch, s, num_heads, head_dim)
    lse = x.new_empty(batch, heads, offsets_q[-1], dtype=compute_dtype(x.dtype))
    gathered = x.new_empty(size, *x.shape) if keep_gathered else x.new_empty(0)
    if lean:
        return out, lse, x.new_empty(0), x.new_empty(0), x.new_empty(0), gathered
    q_heads = x.new_empty(batch, size * s, 3 if text is None else 1, heads, head_dim)
    kv_heads = x.new_empty(0) if text is None else x.new_empty(batch, size * text.shape[1], 2, heads, head_dim)
    return out, lse, q_heads, kv_heads, x.new_empty(batch, offsets_q[-1], heads, head_dim), gathered


@fastseq_attention_backward_op.register_fake
def _(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q_heads: Tensor | None,
    kv_heads: Tensor | None,
    gathered: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    text: Tensor | None,
    kv_weight: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])
    if text is None or kv_weight is None:
        return *grads, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    text_grads = text.new_empty(text.shape), kv_weight.new_empty(kv_weight.shape)
    return *grads, *text_grads, kv_weight.new_empty(kv_weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        *tensors,
        ctx.num_heads,
        ctx.offsets_q,
        ctx.offsets_k,
        ctx.scale,
        ctx.provider,
        ctx.group,
        lean,
        chunked,
        keep_gathered,
    ) = inputs
    x, weight = tensors[:2]
    size = comm.group_size(ctx.group)
    sums_fit = size >= LEAN_MIN_RANKS and _sums_bytes(x, weight, size) <= LEAN_SUMS_BYTES
    ctx.chunked = chunked and (not lean or sums_fit)
    ctx.given = [tensor is not None for tensor in tensors]
    out, lse, q_heads, kv_heads, out_heads, gathered = output
    saved = (out, lse, None, None) if lean else (out_heads, lse, q_heads, kv_heads)
    ctx.save_for_backward(*saved, gathered if keep_gathered else None, *tensors)
    ctx.mark_non_differentiable(*output[1:])
    # Zeros for the gradients of what backward reuses would be as large as q, k, v and o.
    ctx.set_materialize_grads(False)


def _sums_bytes(x: Tensor, weight: Tensor, size: int) -> int:
    """Bytes of dQ, dK and dV of this rank's heads, all tokens, in the dtype they are summed in."""
    return x.shape[0] * size * x.shape[1] * (weight.shape[0] // size) * compute_dtype(x.dtype).itemsize


def _grad(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    rest = ctx.num_heads, ctx.offsets_q, ctx.offsets_k, ctx.scale, ctx.provider, ctx.group, ctx.chunked
    grads = fastseq_attention_backward_op(dout, *ctx.saved_tensors, *rest)
    wanted = [grad if given else None for grad, given in zip(grads, ctx.given, strict=True)]
    # lean and keep_gathered are the forward's alone.
    return *wanted, *(None for _ in rest), None, None


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
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    scale: float,
    provider: str,
    group: str,
    lean: bool,
    chunked: bool,
    keep_gathered: bool,
    **_: Any,
) -> int:
    size = comm.group_size(group)
    head_dim = weight[0] // (num_heads * (3 if text is None else 1))
    attended = attend_flops(x[0], num_heads // size, head_dim, offsets_q, offsets_k, 2)
    return attended + _projection_flops(x, weight, text, kv_weight, size)


@register_flop_formula(torch.ops.longreel.fastseq_attention_backward)
def _backward_flops(
    dout: Any,
    out: Any,
    lse: Any,
    q_heads: Any,
    kv_heads: Any,
    gathered: Any,
    x: Any,
    weight: Any,
    *rest: Any,
    **_: Any,
) -> int:
    text, kv_weight, (num_heads, offsets_q, offsets_k) = rest[1], rest[2], rest[4:7]
    batch, heads, _ = lse
    attended = attend_flops(batch, heads, dout[3], offsets_q, offsets_k, 5)
    # Two products per projection, and once more its forward where it was not kept.
    return attended + (3 if q_heads is None else 2) * _projection_flops(x, weight, text, kv_weight, num_heads // heads)
