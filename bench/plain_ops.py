"""The ops of a DiT block in plain PyTorch, in the tensors' own dtype, as a model's author would write them.

What `eager` runs and `compiled` compiles; in fp32 or fp64 the oracle. Beside them how a packed sequence falls into
clips, and one of frames into frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ADALN_EPS = 1e-6
# Tokens of a latent frame of 256 x 256 pixels (SD-VAE, patch 2): they share a row of modulation.
FRAME_TOKENS = 256

Outputs = tuple[Tensor, ...]


def clip_bounds(seq_len: int) -> tuple[int, ...]:
    """Offsets of four packed clips of uneven lengths, some empty where there are too few tokens."""
    return 0, seq_len // 7, seq_len // 2, seq_len - seq_len // 5, seq_len


def clips(seq_len: int) -> list[tuple[int, int]]:
    """Start and end of every clip that has tokens."""
    return [(start, end) for start, end in itertools.pairwise(clip_bounds(seq_len)) if end > start]


def num_frames(seq_len: int) -> int:
    """Frames of a sequence, the last one cut short where the length does not divide."""
    return -(-seq_len // FRAME_TOKENS)


def frame_bounds(seq_len: int) -> list[int]:
    """Offsets of the frames."""
    return [*range(0, seq_len, FRAME_TOKENS), seq_len]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    """softmax(q k^T / sqrt(D)) v with all scores in memory. q [B, S, H, D], k and v [B, T, H, D]."""
    return (_weigh(_scores(q, k), v),)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Outputs:
    """The same and its log-sum-exp [B, H, S]. hidden [S, T]: keys that a query does not see."""
    scores = _scores(q, k)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return _weigh(scores, v), scores.logsumexp(-1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5


def _weigh(scores: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


def attention_packed(qkv: Tensor) -> Outputs:
    """attention of qkv [B, S, 3, H, D]."""
    return attention(*qkv.unbind(2))


def by_clip(attend: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Attention of a packed sequence (B = 1): a call per clip, one behind the other."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        found = [attend(q[:, a:b], k[:, a:b], v[:, a:b])[0] for a, b in clips(q.shape[1])]
        return (torch.cat(found, dim=1),)

    return run


def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    """LayerNorm(x) (1 + scale) + shift. x [B, S, C]; shift, scale [B, C]."""
    return (F.layer_norm(x, x.shape[-1:], eps=ADALN_EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1),)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Outputs:
    """x + gate y."""
    return (x + gate.unsqueeze(1) * y,)


def gated_adaln(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    """gated and adaln of it."""
    (z,) = gated(x, y, gate)
    return z, *adaln(z, shift, scale)


def adaln_frames(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    """adaln with a row of modulation per frame. x [1, S, C]; shift, scale [frames, C]."""
    shift, scale = (_per_token(row, x) for row in (shift, scale))
    return (F.layer_norm(x, x.shape[-1:], eps=ADALN_EPS) * (1 + scale) + shift,)


def gated_adaln_frames(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    """gated_adaln with a row of modulation per frame."""
    z = x + _per_token(gate, x) * y
    return z, *adaln_frames(z, shift, scale)


def _per_token(rows: Tensor, x: Tensor) -> Tensor:
    return rows.repeat_interleave(FRAME_TOKENS, dim=0)[: x.shape[1]].unsqueeze(0)


def bias_gelu(x: Tensor, bias: Tensor) -> Outputs:
    """gelu_tanh(x + bias)."""
    return (F.gelu(x + bias, approximate="tanh"),)


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> Outputs:
    """Two partial attention outputs [B, S, H, D] merged by their lse [B, H, S]."""
    weight = torch.sigmoid(lse1 - lse2).transpose(1, 2).unsqueeze(-1)
    return (weight * out1 + (1 - weight) * out2).to(out1.dtype), torch.logaddexp(lse1, lse2)


def pack_heads(num_ranks: int) -> Callable[..., Outputs]:
    """x [B, S, G, H, D] plus bias [G H D] -> [P, B, S, G, H / P, D]."""

    def pack(x: Tensor, bias: Tensor) -> Outputs:
        x = x + bias.view(x.shape[2:])
        return (x.unflatten(3, (num_ranks, -1)).permute(3, 0, 1, 2, 4, 5).contiguous(),)

    return pack


def unpack_heads(packed: Tensor) -> Outputs:
    """[P, B, S, G, h, D] -> [B, S, G, P h, D]."""
    return (packed.permute(1, 2, 3, 0, 4, 5).contiguous().flatten(3, 4),)


def pack_tokens(num_ranks: int) -> Callable[..., Outputs]:
    """x [B, T, G, h, D] -> [P, B, s, G, h, D], with zeros behind the last token where P s > T."""

    def pack(x: Tensor) -> Outputs:
        padding = -x.shape[1] % num_ranks
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding)) if padding else x
        return (x.unflatten(1, (num_ranks, -1)).transpose(0, 1).contiguous(),)

    return pack


def unpack_tokens(tokens: int) -> Callable[..., Outputs]:
    """packed [P, B, s, G, h, D] -> [B, T, G, h, D], the padding left out."""

    def unpack(packed: Tensor) -> Outputs:
        return (packed.transpose(0, 1).flatten(1, 2)[:, :tokens].contiguous(),)

    return unpack
