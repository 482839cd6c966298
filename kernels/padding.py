"""Batches padded to one length, for attention: the keys that a sample has, as segments of one packed sequence.

Sample b of S queries and T keys, n of which are there, is two segments of the batch laid end to end: its S queries with
its n keys, and no query with the T - n keys of padding. So no kernel knows of padding, nothing is moved, and what no
query sees gets gradients of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from longreel.kernels.checks import shown
from longreel.kernels.offsets import check_cu_seqlens

# Offsets by the lengths on a device that they were made from, with their version and the shape: made and checked once
# per tensor and not once per layer.
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def padded_segments(kv_lengths: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets cu_seqlens_q and cu_seqlens_k, each [2 B + 1] int64, of a padded batch laid end to end.

    Args:
        kv_lengths: [B] int32 or int64, keys that each sample has, 0 to T.
        q: [B, S, H, D]. k: [B, T, H, D].

    Raises:
        TypeError: kv_lengths is no tensor.
        ValueError: its dtype, shape, device or values do not fit.
    """
    if not isinstance(kv_lengths, Tensor):
        raise TypeError(f"kv_lengths must be an int32 or int64 tensor [B], got {shown(kv_lengths)}")
    if kv_lengths.dtype not in (torch.int32, torch.int64) or list(kv_lengths.shape) != [q.shape[0]]:
        raise ValueError(
            f"kv_lengths must be int32 or int64 [{q.shape[0]}] for q {list(q.shape)}, got {kv_lengths.dtype} "
            f"{list(kv_lengths.shape)}"
        )
    if kv_lengths.device != q.device:
        raise ValueError(f"kv_lengths is on {kv_lengths.device}, q on {q.device}; give it there too")
    kept = not torch.compiler.is_compiling() and kv_lengths.device.type == "cuda" and not kv_lengths.is_inference()
    seen = (kv_lengths._version, *q.shape[:2], k.shape[1]) if kept else None
    if seen is not None and kv_lengths in _made and _made[kv_lengths][0] == seen:
        made: tuple[Tensor, Tensor] = _made[kv_lengths][1]
        return made
    offsets = _offsets(kv_lengths, q, k)
    if seen is not None:
        _made[kv_lengths] = seen, offsets
    return offsets


def _offsets(kv_lengths: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    batch, q_len, k_len = q.shape[0], q.shape[1], k.shape[1]
    samples = torch.arange(batch + 1, device=q.device)
    # 0, S, S, 2 S, 2 S, ..., B S, B S and 0, n_0, T, T + n_1, 2 T, ..., B T.
    cu_q = (samples * q_len).repeat_interleave(2)[1:]
    starts = samples * k_len
    ends = starts[:-1] + kv_lengths
    cu_k = torch.cat((torch.stack((starts[:-1], ends), 1).flatten(), starts[-1:]))
    name = f"kv_lengths must be 0 to {k_len}: as offsets of the batch laid end to end they"
    return cu_q, check_cu_seqlens(name, cu_k, batch * k_len, q.device)


def end_to_end(x: Tensor) -> Tensor:
    """[1, B S, H, D] of [B, S, H, D]: a view where a sample begins behind the last one's end, otherwise a copy."""
    return x.flatten(0, 1).unsqueeze(0)
