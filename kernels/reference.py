"""Executable specifications of every op, in eager PyTorch: the definition the Triton kernels are held to.

Half-precision inputs are computed in fp32 and rounded once at the end; fp32 and fp64 are computed as they are.
Shape letters: B batch, S query tokens, T key tokens, H heads, D head_dim, C channels, N packed segments.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# Query rows per block: bounds the score matrix to BLOCK_Q x T per head whatever the length.
BLOCK_Q = 1024


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a specification computes in: fp32 for half precision, otherwise the input's own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def segments(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """Start and end of every packed segment."""
    bounds = cu_seqlens.tolist()
    return list(itertools.pairwise(bounds))


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * q k^T) v and lse = log sum exp(scale * q k^T).

    Args:
        q: [B, S, H, D]. k, v: [B, T, H, D]. Packed sequences: B = 1, with cu_seqlens [N + 1] on both sides.

    Returns:
        out [B, S, H, D] in q's dtype, zero where there is no key; lse [B, H, S] in compute_dtype, -inf there.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=compute_dtype(q.dtype))
    for q_range, k_range in _blocks(q, k, cu_seqlens_q, cu_seqlens_k):
        b_q, b_k, b_v = _upcast(q[:, q_range], k[:, k_range], v[:, k_range])
        scores = torch.einsum("bshd,bthd->bhst", b_q, b_k) * softmax_scale
        b_lse = torch.logsumexp(scores, dim=-1)
        p = _probabilities(scores, b_lse)
        out[:, q_range] = torch.einsum("bhst,bthd->bshd", p, b_v).to(q.dtype)
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
    """Gradients of attention_fwd: dS = P * (dout v^T - delta) with delta = rowsum(dout * out) - dlse.

    Returns:
        dq, dk, dv, contiguous, in the inputs' dtype.
    """
    dtype = compute_dtype(q.dtype)
    dq = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    dk = torch.zeros_like(k, dtype=dtype, memory_format=torch.contiguous_format)
    dv = torch.zeros_like(v, dtype=dtype, memory_format=torch.contiguous_format)
    for q_range, k_range in _blocks(q, k, cu_seqlens_q, cu_seqlens_k):
        b_q, b_k, b_v, b_out, b_dout = _upcast(
            q[:, q_range], k[:, k_range], v[:, k_range], out[:, q_range], dout[:, q_range]
        )
        delta = (b_dout * b_out).sum(-1).transpose(1, 2)
        if dlse is not None:
            delta = delta - dlse[:, :, q_range]
        scores = torch.einsum("bshd,bthd->bhst", b_q, b_k) * softmax_scale
        p = _probabilities(scores, lse[:, :, q_range])
        dv[:, k_range] += torch.einsum("bhst,bshd->bthd", p, b_dout)
        ds = p * (torch.einsum("bshd,bthd->bhst", b_dout, b_v) - delta.unsqueeze(-1)) * softmax_scale
        dq[:, q_range] += torch.einsum("bhst,bthd->bshd", ds, b_k)
        dk[:, k_range] += torch.einsum("bhst,bshd->bthd", ds, b_q)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(compute_dtype(t.dtype)) for t in tensors)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # A row without keys has lse = -inf and no columns; the guard keeps -inf - -inf = NaN out.
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))


def _blocks(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> list[tuple[slice, slice]]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        pairs = [((0, q.shape[1]), (0, k.shape[1]))]
    else:
        pairs = list(zip(segments(cu_seqlens_q), segments(cu_seqlens_k), strict=True))
    return [
        (slice(start, min(start + BLOCK_Q, q_end)), slice(*keys))
        for (q_start, q_end), keys in pairs
        for start in range(q_start, q_end, BLOCK_Q)
    ]


def merge_attention_fwd(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the attention over each: w1 = sigmoid(lse1 - lse2), w2 = 1 - w1.

    A side whose lse is -inf saw no key: its weight is 0 whatever its out holds. Both -inf: out 0, lse -inf.

    Args:
        out1, out2: [B, S, H, D]. lse1, lse2: [B, H, S] in compute_dtype.

    Returns:
        out = w1 out1 + w2 out2 in out1's dtype; lse = log(exp(lse1) + exp(lse2)).
    """
    w1, w2 = _merge_weights(lse1, lse2)
    b_out1, b_out2 = _upcast(_seen(out1, lse1), _seen(out2, lse2))
    # logaddexp gives -inf for two -inf.
    out = (_per_row(w1) * b_out1 + _per_row(w2) * b_out2).to(out1.dtype)
    return out.contiguous(), torch.logaddexp(lse1, lse2).contiguous()


def merge_attention_bwd(
    dout: Tensor, dlse: Tensor | None, out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of merge_attention_fwd: dout_i = w_i dout and dlse_i = w_i (dlse +- w_j dout . (out1 - out2)).

    Everything of a side whose lse is -inf is 0.
    """
    w1, w2 = _merge_weights(lse1, lse2)
    b_dout, b_out1, b_out2 = _upcast(dout, _seen(out1, lse1), _seen(out2, lse2))
    shift = w1 * w2 * (b_dout * (b_out1 - b_out2)).sum(-1).transpose(1, 2)
    dlse1, dlse2 = shift, -shift
    if dlse is not None:
        dlse1, dlse2 = dlse1 + w1 * dlse, dlse2 + w2 * dlse
    dout1, dout2 = ((_per_row(w) * b_dout).to(out1.dtype) for w in (w1, w2))
    return dout1.contiguous(), dlse1.contiguous(), dout2.contiguous(), dlse2.contiguous()


def _merge_weights(lse1: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    # -inf - -inf is NaN, and then neither side counts.
    difference = lse1 - lse2
    none = (lse1 == float("-inf")) & (lse2 == float("-inf"))
    return torch.sigmoid(difference).masked_fill(none, 0.0), torch.sigmoid(-difference).masked_fill(none, 0.0)


def _per_row(value: Tensor) -> Tensor:
    return value.transpose(1, 2).unsqueeze(-1)


def _seen(out: Tensor, lse: Tensor) -> Tensor:
    return out.masked_fill(_per_row(lse == float("-inf")), 0.0)


def adaln_modulate_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y = LayerNorm(x) * (1 + scale) + shift, LayerNorm over C without affine.

    Args:
        x: [B, S, C]. shift, scale: [B, C], or [N, C] for segments of a packed sequence (B = 1, cu_seqlens [N + 1]).

    Returns:
        y [B, S, C]; mean and rstd [B, S] in compute_dtype, which backward reuses.
    """
    b_x, b_shift, b_scale = _upcast(x, shift, scale)
    mean = b_x.mean(-1)
    centred = b_x - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd.unsqueeze(-1) * (1 + per_token(b_scale, x, cu_seqlens)) + per_token(b_shift, x, cu_seqlens)
    return y.to(x.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def adaln_modulate_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of adaln_modulate_fwd: dx [B, S, C], dshift and dscale like scale."""
    b_dy, b_x, b_scale = _upcast(dy, x, scale)
    normed = (b_x - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dnormed = b_dy * (1 + per_token(b_scale, x, cu_seqlens))
    inner = (dnormed * normed).mean(-1, keepdim=True)
    dx = (dnormed - dnormed.mean(-1, keepdim=True) - normed * inner) * rstd.unsqueeze(-1)
    dshift = sum_tokens(b_dy, scale, cu_seqlens)
    dscale = sum_tokens(b_dy * normed, scale, cu_seqlens)
    return dx.to(x.dtype).contiguous(), dshift.to(scale.dtype).contiguous(), dscale.to(scale.dtype).contiguous()


def gated_residual_fwd(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x + gate * y. x, y: [B, S, C]; gate: [B, C], or [N, C] with cu_seqlens."""
    b_x, b_y, b_gate = _upcast(x, y, gate)
    return (b_x + per_token(b_gate, x, cu_seqlens) * b_y).to(x.dtype).contiguous()


def gated_residual_bwd(dz: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of gated_residual_fwd: dy [B, S, C] and dgate like gate (dx is dz itself)."""
    b_dz, b_y, b_gate = _upcast(dz, y, gate)
    dy = per_token(b_gate, y, cu_seqlens) * b_dz
    dgate = sum_tokens(b_dz * b_y, gate, cu_seqlens)
    return dy.to(y.dtype).contiguous(), dgate.to(gate.dtype).contiguous()


def gated_residual_adaln_fwd(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = x + gate * y, rounded, and adaln_modulate_fwd of that z.

    Returns:
        z and modulated [B, S, C]; mean and rstd of z [B, S] in compute_dtype.
    """
    z = gated_residual_fwd(x, y, gate, cu_seqlens)
    return z, *adaln_modulate_fwd(z, shift, scale, eps, cu_seqlens)


def gated_residual_adaln_bwd(
    dz: Tensor,
    dmodulated: Tensor,
    y: Tensor,
    z: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gated_residual_adaln_fwd: dx and dy [B, S, C]; dgate, dshift and dscale like gate."""
    # Unrounded between the two ops, so upcast first.
    dtype = compute_dtype(z.dtype)
    dnorm, dshift, dscale = adaln_modulate_bwd(
        dmodulated.to(dtype), z.to(dtype), scale.to(dtype), mean, rstd, cu_seqlens
    )
    dx = dnorm + dz
    dy, dgate = gated_residual_bwd(dx, y.to(dtype), gate.to(dtype), cu_seqlens)
    return tuple(t.to(z.dtype).contiguous() for t in (dx, dy, dgate, dshift, dscale))  # type: ignore[return-value]


_GELU_SCALE = 0.7978845608028654  # sqrt(2 / pi)
_GELU_CUBIC = 0.044715


def bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    """gelu_tanh(x + bias). x: [..., C], bias: [C]. Source: Hendrycks and Gimpel 2016, tanh form."""
    u, b = _upcast(x, bias)
    u = u + b
    return (0.5 * u * (1 + torch.tanh(_GELU_SCALE * (u + _GELU_CUBIC * u**3)))).to(x.dtype).contiguous()


def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of bias_gelu_fwd: dx [..., C] and dbias [C]; only x and bias are needed from forward."""
    b_dy, u, b = _upcast(dy, x, bias)
    u = u + b
    t = torch.tanh(_GELU_SCALE * (u + _GELU_CUBIC * u**3))
    slope = 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * _GELU_SCALE * (1 + 3 * _GELU_CUBIC * u * u)
    dx = b_dy * slope
    return dx.to(x.dtype).contiguous(), dx.reshape(-1, dx.shape[-1]).sum(0).to(bias.dtype)


def sp_pack_heads_fwd(x: Tensor, bias: Tensor | None, num_ranks: int) -> Tensor:
    """Heads ordered by the rank they go to: [B, s, G, H, D] (plus bias [G H D]) -> [P, B, s, G, H / P, D]."""
    if bias is not None:
        b_x, b_bias = _upcast(x, bias)
        x = (b_x + b_bias.view(x.shape[2:])).to(x.dtype)
    # Never the input itself: an op's result has storage of its own.
    return x.unflatten(3, (num_ranks, -1)).permute(3, 0, 1, 2, 4, 5).clone(memory_format=torch.contiguous_format)


def sp_pack_heads_bwd(dpacked: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of sp_pack_heads_fwd: dx [B, s, G, H, D] and dbias [G H D]."""
    dx = sp_unpack_heads_fwd(dpacked)
    return dx, dx.to(compute_dtype(dx.dtype)).sum((0, 1)).flatten().to(dx.dtype)


def sp_unpack_heads_fwd(packed: Tensor) -> Tensor:
    """Heads back in one row: [P, B, s, G, h, D] -> [B, s, G, P h, D]."""
    return packed.permute(1, 2, 3, 0, 4, 5).clone(memory_format=torch.contiguous_format).flatten(3, 4)


def sp_pack_tokens_fwd(x: Tensor, num_ranks: int, rows: int) -> Tensor:
    """Tokens ordered by the rank they go to, zeros after the last: [B, T, G, h, D] -> [P, B, rows, G, h, D]."""
    padded = x.new_zeros(x.shape[0], num_ranks * rows, *x.shape[2:])
    padded[:, : x.shape[1]] = x
    return padded.unflatten(1, (num_ranks, rows)).transpose(0, 1).contiguous()


def sp_unpack_tokens_fwd(packed: Tensor, tokens: int) -> Tensor:
    """The first `tokens` tokens of all ranks in order: [P, B, s, G, h, D] -> [B, tokens, G, h, D]."""
    whole = packed.transpose(0, 1).flatten(1, 2)[:, :tokens]
    return whole.clone(memory_format=torch.contiguous_format)


def per_token(value: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Per-sample (or per-segment) rows, broadcastable against x [B, S, C]."""
    if cu_seqlens is None:
        return value.unsqueeze(1)
    return value[_segment_of_token(x, cu_seqlens)].unsqueeze(0)


def sum_tokens(value: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sum of value [B, S, C] over the tokens of each sample (or segment), shaped like `like`."""
    if cu_seqlens is None:
        return value.sum(1)
    total = value.new_zeros(like.shape)
    return total.index_add_(0, _segment_of_token(value, cu_seqlens), value[0])


def _segment_of_token(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    token = torch.arange(x.shape[1], device=x.device)
    return torch.bucketize(token, cu_seqlens[1:].to(token.dtype), right=True)
