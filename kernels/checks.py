"""Argument checks of the public ops: every message names the argument, its value and what would work."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

MAX_HEAD_DIM = 128
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What the specifications compute in: every op refuses the rest, whoever computes it.
DTYPES = (*TRITON_DTYPES, torch.float64)


def check_tensor(name: str, value: Any, dims: str | None = None) -> None:
    """Refuse what is no dense tensor of bfloat16, float16, float32 or float64.

    Args:
        dims: names of the dims that it must have, as `[B, S, C]`; any number of them when None.

    Raises:
        TypeError: it is no tensor.
        ValueError: another dtype, layout or number of dims, or a tangent of forward-mode differentiation, which the
            ops would drop.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {shown(value)}")
    if value.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {value.dtype}; it must be one of {', '.join(str(d) for d in DTYPES)}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} has layout {value.layout}; it must be dense: give {name}.to_dense()")
    if dims is not None and value.dim() != dims.count(",") + 1:
        raise ValueError(f"{name} must be {dims}, got {list(value.shape)}")
    if unpack_dual(value).tangent is not None:
        raise ValueError(
            f"{name} has a tangent of forward-mode differentiation, and the ops have reverse mode only: use "
            "torch.autograd.grad or torch.func.vjp"
        )


def check_same(name: str, tensor: Tensor, ref_name: str, ref: Tensor) -> None:
    """Refuse what is no tensor (TypeError), or of another dtype or device than the reference tensor (ValueError)."""
    check_tensor(name, tensor)
    if tensor.dtype != ref.dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, {ref_name} has {ref.dtype}; they must be the same")
    if tensor.device != ref.device:
        raise ValueError(f"{name} is on {tensor.device}, {ref_name} on {ref.device}; they must be on one device")


def check_shape(name: str, tensor: Tensor, ref_name: str, ref: Tensor) -> None:
    """As check_same, and ValueError when the shapes differ."""
    check_same(name, tensor, ref_name, ref)
    if tensor.shape != ref.shape:
        raise ValueError(f"{name} {list(tensor.shape)} must have {ref_name}'s shape {list(ref.shape)}")


def check_last_dim(name: str, tensor: Tensor) -> None:
    """ValueError unless the last dim is contiguous."""
    if tensor.stride(-1) != 1 and tensor.numel():
        raise ValueError(f"{name}'s last dim has stride {tensor.stride(-1)}; it must be contiguous (stride 1)")


def check_number(name: str, value: Any, minimum: float = -math.inf) -> None:
    """Refuse what is no finite number, at least minimum: TypeError for another type, ValueError for the value."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not math.isfinite(value) or value < minimum:
        at_least = "" if minimum == -math.inf else f" and at least {minimum:g}"
        raise ValueError(f"{name} must be finite{at_least}, got {value}")


def check_count(name: str, value: Any, minimum: int) -> None:
    """Refuse what is no integer (TypeError), at least minimum (ValueError)."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_head_dim(name: str, head_dim: int) -> None:
    """ValueError unless head_dim is a multiple of 8, at most 128."""
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name} has head_dim {head_dim}; it must be a multiple of 8, at most {MAX_HEAD_DIM}")


def check_triton_dtype(name: str, dtype: torch.dtype) -> None:
    """ValueError for a dtype that the Triton attention kernels do not compute in."""
    if dtype not in TRITON_DTYPES:
        names = ", ".join(str(d) for d in TRITON_DTYPES)
        raise ValueError(f"{name} has dtype {dtype}; provider 'triton' computes in {names}; use provider 'torch'")


def check_rows(name: str, x: Tensor) -> None:
    """As check_tensor, and ValueError for rows of no channels: they have no mean."""
    check_tensor(name, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., C] with C at least 1, got {list(x.shape)}")


def shown(value: Any) -> str:
    """Type and value of what was given, cut where it is long."""
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 80 else text[:77] + "..."
