"""Tile shapes of the Triton attention kernels, as named constants per direction, width and length class.

Each says what it rests on: `assumed` ones were chosen by what the compiled kernel takes of registers and shared memory,
not by the clock; `measured` ones name the record. A campaign times candidates() and writes what wins into MEASURED.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Direction = Literal["forward", "dkdv", "dq", "fused"]
LengthClass = Literal["short", "long"]
Evidence = Literal["assumed", "measured"]

# Assumed: keys from which on a launch counts as long, where the loop over the other side is all that matters.
LONG = 16_384


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionTiles:
    """Shape of one program's work: block_m query rows, block_n keys, and how it is compiled.

    max_registers caps the registers of a thread, so that planned_programs fit on one multiprocessor of Hopper. record
    names the measurement behind evidence `measured`.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    planned_programs: int
    max_registers: int | None = None
    evidence: Evidence = "assumed"
    record: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class HopperTiles:
    """Shape of the warp-specialised forward kernel: consumers warpgroups of 64 query rows, block_n keys per stage.

    registers are a consumer thread's after the producer gave up its own; poly of every 8 exponentials are polynomials.
    One program fits on a multiprocessor; programs are as many as those.
    """

    block_n: int
    consumers: int
    num_stages: int
    registers: int
    poly: int
    evidence: Evidence = "assumed"
    record: str | None = None

    def __post_init__(self) -> None:
        if self.num_stages < 2:
            raise ValueError(f"num_stages {self.num_stages} would deadlock; it must be at least 2")


# Half precision, by direction and the widest sum of head_dim's parts it serves (80 is head_dim 72 as 64 + 16).
# In the forward kernel at 80 the tail's copies are 8 bytes wide: 64 rows of 16 columns are 8 bytes for each of 256
# threads, one instruction either way, and 16 bytes from half of the threads would save none.
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
    ("fused", 64): AttentionTiles(block_m=64, block_n=128, num_warps=8, num_stages=2, planned_programs=1),
    # Of 32 rows no product for dq would be a wgmma.
    ("fused", 80): AttentionTiles(block_m=64, block_n=128, num_warps=8, num_stages=3, planned_programs=1),
    # 24 to 32 bytes of a thread lie in local memory while the loop runs, and none is touched inside it.
    ("fused", 96): AttentionTiles(block_m=64, block_n=128, num_warps=8, num_stages=3, planned_programs=1),
    ("fused", 128): AttentionTiles(block_m=32, block_n=128, num_warps=8, num_stages=2, planned_programs=1),
}
# By the widest head_dim it serves.
HOPPER_TILES: dict[int, HopperTiles] = {
    72: HopperTiles(block_n=128, consumers=2, num_stages=3, registers=240, poly=2),
    128: HopperTiles(block_n=128, consumers=2, num_stages=2, registers=240, poly=1),
}
# What a campaign found for one length class; consulted before the two above.
MEASURED: dict[tuple[Direction, int, LengthClass], AttentionTiles] = {}
MEASURED_HOPPER: dict[tuple[int, LengthClass], HopperTiles] = {}
# fp32 multiplies on FMA units in full precision: for tests and small models, not tuned for speed.
TILES_FP32 = AttentionTiles(block_m=32, block_n=16, num_warps=4, num_stages=1, planned_programs=1)

# The kernel of delta = rowsum(dout * out) - dlse; its rows per program are the block_m of dkdv. Evidence: assumed.
DELTA_WARPS = 4


# (block_m, block_n, num_warps, num_stages, max_registers) that candidates() adds to what a launch would take.
_SHAPES: dict[Direction, list[tuple[int, int, int, int, int | None]]] = {
    "forward": [(128, 64, 8, 3, 128), (128, 64, 4, 2, None), (128, 128, 8, 2, None), (64, 64, 4, 3, 168)],
    "dkdv": [(64, 64, 4, 2, None), (64, 128, 8, 2, None), (32, 128, 8, 2, None), (64, 64, 4, 1, None)],
    "dq": [(64, 64, 4, 2, None), (128, 64, 8, 2, None), (64, 64, 4, 2, 168), (128, 32, 8, 3, 128)],
    "fused": [(64, 128, 8, 2, None), (64, 128, 8, 3, None), (32, 128, 8, 2, None), (32, 64, 4, 2, None)],
}


def length_class(length: int) -> LengthClass:
    """`long` from 16,384 rows on the side that streams past."""
    return "long" if length >= LONG else "short"


def attention_tiles(direction: Direction, width: int, dtype: torch.dtype, length: int = LONG) -> AttentionTiles:
    """The tiles a launch uses.

    Args:
        direction: `forward`, `dkdv`, `dq`, or `fused` (dk, dv and dq in one kernel).
        width: columns computed per row, the sum of split_head_dim's parts, at most 128.
        dtype: of the inputs.
        length: rows of the side that streams past.
    """
    if dtype == torch.float32:
        return TILES_FP32
    serves = min(widest for kind, widest in TILES if kind == direction and widest >= width)
    return MEASURED.get((direction, serves, length_class(length)), TILES[direction, serves])


def hopper_tiles(head_dim: int, length: int = LONG) -> HopperTiles:
    """The tiles of the warp-specialised forward kernel for this head_dim and number of keys."""
    serves = min(widest for widest in HOPPER_TILES if widest >= head_dim)
    return MEASURED_HOPPER.get((serves, length_class(length)), HOPPER_TILES[serves])


def candidates(direction: Direction, width: int, length: LengthClass) -> list[AttentionTiles]:
    """What a campaign should time for one (direction, width, length class), the launch's own choice first.

    Shapes that cannot fit are left to the compiler to refuse; few enough that all of them are timed. Short sequences
    also try half as many rows per program, which gives more programs.

    Args:
        direction, width: as in attention_tiles.
        length: `short` or `long`.
    """
    seq_len = LONG if length == "long" else LONG - 1
    own = attention_tiles(direction, width, torch.bfloat16, seq_len)
    shapes = list(_SHAPES[direction])
    if length == "short":
        shapes.append((64, 64, 4, 2, None))
    tried = [
        AttentionTiles(block_m=m, block_n=n, num_warps=w, num_stages=s, max_registers=r, planned_programs=1)
        for m, n, w, s, r in shapes
    ]
    return list(dict.fromkeys([own, *tried]))


def hopper_candidates(head_dim: int, length: LengthClass) -> list[HopperTiles]:
    """As candidates(), for the warp-specialised forward kernel."""
    own = hopper_tiles(head_dim, LONG if length == "long" else LONG - 1)
    tried = [replace(own, poly=poly, evidence="assumed", record=None) for poly in (0, 1, 2, 3)]
    if head_dim <= 72:
        tried += [HopperTiles(block_n=128, consumers=2, num_stages=4, registers=240, poly=own.poly)]
        tried += [HopperTiles(block_n=64, consumers=3, num_stages=6, registers=160, poly=poly) for poly in (0, 1, 2)]
    return list(dict.fromkeys([own, *tried]))
