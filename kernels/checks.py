"""Argument checks of the public ops: every message names the argument, its value and what would work."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

MAX_HEAD_DIM = 128
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Offsets on a device that were read and found right, with their version and length: reading waits for the device, so
# it happens once per tensor and not once per layer.
_checked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_same(name: str, tensor: Tensor, ref_name: str, ref: Tensor) -> None:
    """ValueError when dtype or device differ from the reference tensor's."""
    if tensor.dtype != ref.dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, {ref_name} has {ref.dtype}; they must be the same")
    if tensor.device != ref.device:
        raise ValueError(f"{name} is on {tensor.device}, {ref_name} on {ref.device}; they must be on one device")


def check_head_dim(name: str, head_dim: int) -> None:
    """ValueError unless head_dim is a multiple of 8, at most 128."""
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name} has head_dim {head_dim}; it must be a multiple of 8, at most {MAX_HEAD_DIM}")


def check_triton_dtype(name: str, dtype: torch.dtype) -> None:
    """ValueError for a dtype that the Triton attention kernels do not compute in."""
    if dtype not in TRITON_DTYPES:
        names = ", ".join(str(d) for d in TRITON_DTYPES)
        raise ValueError(f"{name} has dtype {dtype}; provider 'triton' computes in {names}; use provider 'torch'")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, length: int, device: torch.device, rows: int | None = None) -> None:
    """ValueError unless cu_seqlens is an integer vector on device that starts at 0, never falls and ends at length.

    The values of a tensor on a device are read, which waits for it, the first time the tensor is seen; later calls
    look at its version only.

    Args:
        rows: number of segments there must be, where another argument fixes it.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be an int32 or int64 vector of N + 1 offsets, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"{name} is on {cu_seqlens.device}, the tensor it splits on {device}; give it there too")
    if rows is not None and cu_seqlens.numel() != rows + 1:
        raise ValueError(f"{name} has {cu_seqlens.numel()} offsets for {rows} segments; it needs {rows + 1}")
    # Traced and fake tensors have no values to read.
    if torch.compiler.is_compiling() or isinstance(cu_seqlens, torch._subclasses.FakeTensor):
        return
    remembered = cu_seqlens.device.type != "cpu" and not cu_seqlens.is_inference()
    seen = (cu_seqlens._version, length) if remembered else None
    if seen is not None and _checked.get(cu_seqlens) == seen:
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"{name} must start at 0, never fall and end at the length {length}, got {bounds}")
    if seen is not None:
        _checked[cu_seqlens] = seen


def check_modulation(name: str, value: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """ValueError unless value holds one row of C per sample of x [B, S, C] (or per segment of a packed sequence)."""
    if x.dim() != 3:
        raise ValueError(f"x must be [B, S, C], got {list(x.shape)}")
    check_same(name, value, "x", x)
    if cu_seqlens is None:
        expected = [x.shape[0], x.shape[2]]
    else:
        if x.shape[0] != 1:
            raise ValueError(f"cu_seqlens packs sequences into batch 1, but x has batch {x.shape[0]}")
        check_cu_seqlens("cu_seqlens", cu_seqlens, x.shape[1], x.device)
        expected = [cu_seqlens.numel() - 1, x.shape[2]]
    if list(value.shape) != expected:
        raise ValueError(f"{name} must be {expected} for x {list(x.shape)}, got {list(value.shape)}")
