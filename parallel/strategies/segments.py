"""Segments of a sequence, the clips packed into it: their offsets on the host, and those of a range of its tokens.

Offsets are cu_seqlens, [0, end of the first segment, ..., end of the sequence]; a sequence that is not packed is one
segment, [0, S], and its batch may be larger than 1. They live on the host, where FLOPs are counted and where empty
pairs of ranges are left out without waiting for a device; kernels get them as a tensor, made once per set of offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

# Offset tensors of so many ranges are kept: some 2 P sets of one batch, and those of the batches before.
_KEPT = 256


def window(offsets: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    """Offsets of the same segments among tokens start .. stop - 1, counted from start; segments outside are empty."""
    return tuple(min(max(offset, start), stop) - start for offset in offsets)


def part_offsets(offsets: Sequence[int], rows: int, owner: int) -> tuple[int, ...]:
    """Offsets within the owner's part, parts being of `rows` tokens; the last offset counts those that exist."""
    return window(offsets, owner * rows, (owner + 1) * rows)


def kernel_offsets(offsets: Sequence[int] | None, like: Tensor) -> Tensor | None:
    """Offsets as attention takes them: int64 [N + 1] beside a tensor, or None for a single segment."""
    if offsets is None or len(offsets) == 2:
        return None
    # Not kept: what is made while tensors are fake would be fake for ever.
    if type(like) is not Tensor or torch.compiler.is_compiling():
        return torch.tensor(offsets, device=like.device)
    made = _kept_offsets(tuple(offsets), like.device)
    if type(made) is not Tensor:
        # A fake mode may take a real tensor beside it: what is new then is fake all the same.
        _kept_offsets.cache_clear()
    return made


@lru_cache(_KEPT)
def _kept_offsets(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    # Sampling under inference mode may ask first, training later.
    with torch.inference_mode(False):
        return torch.tensor(offsets, device=device)


def score_pairs(offsets_q: Sequence[int], offsets_k: Sequence[int]) -> int:
    """(query, key) pairs that meet in attention: sum over segments of queries times keys."""
    return sum(
        (q1 - q0) * (k1 - k0) for (q0, q1), (k0, k1) in zip(pairwise(offsets_q), pairwise(offsets_k), strict=True)
    )
