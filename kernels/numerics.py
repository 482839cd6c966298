"""The one table of tolerances, and the metric that distributed runs are held to.

Used by tests and by the benchmark's correctness gate; an exception carries its reason where it is made.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Distributed against one device, by dtype: ||g - g0|| <= tolerance * reference norm.
PARALLEL_TOLERANCE: dict[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 1e-5}

# A kernel passes at this many times the error of eager computation in its own dtype, plus one floor in units of eps.
KERNEL_ERROR_FACTOR = 2.0


def relative_error(value: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """||value - reference|| / max(||reference||, floor), in fp64; NaN or infinity in value gives infinity.

    Args:
        value, reference: tensors of one shape.
        floor: smallest norm to divide by.
    """
    if value.shape != reference.shape:
        raise ValueError(f"value {list(value.shape)} and reference {list(reference.shape)} must have one shape")
    difference = torch.linalg.vector_norm(value.double() - reference.double()).item()
    if difference != difference:
        return float("inf")
    scale = max(torch.linalg.vector_norm(reference.double()).item(), floor)
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def gradient_errors(grads: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """Error of every gradient, relative to max(its own norm, the largest bias-gradient norm of its module).

    A key bias has a true gradient of zero, so a plain relative error of it is noise. The module of a parameter is its
    block (`blocks.3`) or its top-level module.

    Args:
        grads, reference: gradients by parameter name.

    Returns:
        Errors by parameter name.

    Raises:
        ValueError: the two do not have the same names.
    """
    if grads.keys() != reference.keys():
        raise ValueError(f"gradients of different parameters: {sorted(grads.keys() ^ reference.keys())}")
    floors: dict[str, float] = {}
    for name, value in reference.items():
        if name.endswith("bias"):
            norm = torch.linalg.vector_norm(value.double()).item()
            floors[_module_of(name)] = max(floors.get(_module_of(name), 0.0), norm)
    return {name: relative_error(grads[name], reference[name], floors.get(_module_of(name), 0.0)) for name in reference}


def _module_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
