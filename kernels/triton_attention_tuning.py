"""Tile shapes of the Triton attention kernels, as named constants per direction and width.

`assumed` ones were chosen by what the compiled kernel takes of registers and shared memory, not by the clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Direction = Literal["forward", "dkdv", "dq"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionTiles:
    """Shape of one program's work: block_m query rows, block_n keys, and how it is compiled.

    max_registers caps the registers of a thread, so that planned_programs fit on one multiprocessor of Hopper.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    planned_programs: int
    max_registers: int | None = None
    chosen: Literal["assumed", "measured"] = "assumed"


# Half precision, by direction and the widest sum of head_dim's parts it serves (80 is head_dim 72 as 64 + 16).
TILES: dict[tuple[Direction, int], AttentionTiles] = {
    ("forward", 80): AttentionTiles(
        block_m=128, block_n=64, num_warps=8, num_stages=3, planned_programs=2, max_registers=128
    ),
    ("forward", 96): AttentionTiles(block_m=128, block_n=64, num_warps=8, num_stages=2, planned_programs=1),
    ("forward", 128): AttentionTiles(block_m=128, block_n=128, num_warps=8, num_stages=2, planned_programs=1),
    ("dkdv", 80): AttentionTiles(block_m=64, block_n=64, num_warps=4, num_stages=2, planned_programs=2),
    ("dkdv", 128): AttentionTiles(block_m=32, block_n=128, num_warps=8, num_stages=2, planned_programs=1),
    ("dq", 80): AttentionTiles(block_m=64, block_n=64, num_warps=4, num_stages=2, planned_programs=2),
    ("dq", 128): AttentionTiles(block_m=128, block_n=64, num_warps=8, num_stages=2, planned_programs=1),
}
# fp32 multiplies on FMA units in full precision: for tests and small models, not tuned for speed.
TILES_FP32 = AttentionTiles(block_m=32, block_n=16, num_warps=4, num_stages=1, planned_programs=1)

# The kernel of delta = rowsum(dout * out) - dlse; its rows per program are the block_m of dkdv.
DELTA_WARPS = 4


def attention_tiles(direction: Direction, width: int, dtype: torch.dtype) -> AttentionTiles:
    """The tiles a launch uses.

    Args:
        direction: `forward`, `dkdv` or `dq`.
        width: columns computed per row, the sum of split_head_dim's parts, at most 128.
        dtype: of the inputs.
    """
    if dtype == torch.float32:
        return TILES_FP32
    return TILES[direction, min(widest for kind, widest in TILES if kind == direction and widest >= width)]
