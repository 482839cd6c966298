"""FLOP formula of the memory-bound ops: none of their work counts.

torch's FlopCounterMode counts matrix products, convolutions and attention, and nothing for the element-wise ops that
these stand for. A fused op counts as they do, so that a model's FLOPs, its MFU and its HFU are the same by every
provider; what measures a memory-bound op is the bytes it moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def count_no_flops(*ops: Any) -> None:
    """Register a formula of zero for these custom ops."""
    for op in ops:
        namespace, name = op._qualname.split("::")
        register_flop_formula(getattr(getattr(torch.ops, namespace), name))(_no_flops)


def _no_flops(*_: Any, **__: Any) -> int:
    return 0
