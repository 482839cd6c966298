"""Checks of cu_seqlens, the offsets of packed sequences, and of what they index.

Traced code cannot read them: there an op does, when it runs.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from longreel.kernels.checks import check_rows, check_same, check_tensor, shown
from longreel.kernels.memory_bound import count_no_flops

# Offsets on a device that were read and found right, with their version and length: reading waits for the device, so
# it happens once per tensor and not once per layer.
_checked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_cu_seqlens(
    name: str, cu_seqlens: Tensor, length: int, device: torch.device, rows: int | None = None
) -> Tensor:
    """Refuse what is no integer vector on device that starts at 0, never falls and ends at length.

    The values of a tensor on a device are read, which waits for it, the first time the tensor is seen; later calls
    look at its version only. Compiled code reads them when it runs, by an op.

    Args:
        rows: number of segments there must be, where another argument fixes it.

    Returns:
        The offsets to go on with: cu_seqlens, or in traced code the result of the op that checks them.

    Raises:
        TypeError: it is no tensor.
        ValueError: dtype, dims, device or values do not fit.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be an int32 or int64 tensor of N + 1 offsets, got {shown(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be an int32 or int64 vector of N + 1 offsets, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"{name} is on {cu_seqlens.device}, the tensor it splits on {device}; give it there too")
    if rows is not None and cu_seqlens.numel() != rows + 1:
        raise ValueError(f"{name} has {cu_seqlens.numel()} offsets for {rows} segments; it needs {rows + 1}")
    if torch.compiler.is_compiling():
        return checked_offsets_op(cu_seqlens, length, name)
    # A fake tensor has no values, now or later.
    if not isinstance(cu_seqlens, torch._subclasses.FakeTensor):
        _check_values(name, cu_seqlens, length)
    return cu_seqlens


@torch.library.custom_op("longreel::checked_offsets", mutates_args=())
def checked_offsets_op(cu_seqlens: Tensor, length: int, name: str) -> Tensor:
    """A copy of the offsets that were found right: compiled code would drop an op that returns nothing."""
    _check_values(name, cu_seqlens, length)
    return cu_seqlens.clone(memory_format=torch.contiguous_format)


@checked_offsets_op.register_fake
def _(cu_seqlens: Tensor, *_: Any) -> Tensor:
    return cu_seqlens.new_empty(cu_seqlens.shape)


count_no_flops(checked_offsets_op)


def _check_values(name: str, cu_seqlens: Tensor, length: int) -> None:
    on_device = cu_seqlens.device.type != "cpu"
    remembered = on_device and not cu_seqlens.is_inference()
    seen = (cu_seqlens._version, length) if remembered else None
    if seen is not None and _checked.get(cu_seqlens) == seen:
        return
    # Nothing can be read while a CUDA graph is recorded; the run that warmed it up has read the values.
    if on_device and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"{name} must start at 0, never fall and end at the length {length}, got {bounds}")
    if seen is not None:
        _checked[cu_seqlens] = seen


def check_modulation(rows: dict[str, Tensor], x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """Refuse x unless it is [B, S, C], and rows unless each has one of C per sample (or per segment of one sequence).

    Args:
        rows: by argument name.

    Returns:
        The offsets to go on with, as check_cu_seqlens.

    Raises:
        TypeError: no tensor.
        ValueError: dtype, device, dims or offsets do not fit.
    """
    check_tensor("x", x, "[B, S, C]")
    check_rows("x", x)
    expected = [x.shape[0], x.shape[2]]
    if cu_seqlens is not None:
        if x.shape[0] != 1:
            raise ValueError(f"cu_seqlens packs sequences into batch 1, but x has batch {x.shape[0]}")
        cu_seqlens = check_cu_seqlens("cu_seqlens", cu_seqlens, x.shape[1], x.device)
        expected[0] = cu_seqlens.numel() - 1
    for name, value in rows.items():
        check_same(name, value, "x", x)
        if list(value.shape) != expected:
            raise ValueError(f"{name} must be {expected} for x {list(x.shape)}, got {list(value.shape)}")
    return cu_seqlens
