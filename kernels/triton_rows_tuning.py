"""Tiles of the memory-bound Triton kernels, as named constants per kernel and length class.

Each says what it rests on: `assumed` ones keep some 27 KiB of loads in flight per multiprocessor without spills, by
what the compiled kernel takes; `measured` ones name the record. A campaign times row_candidates() and writes what wins
into MEASURED_ROWS.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from longreel.kernels.triton_attention_tuning import Evidence, LengthClass, length_class

RowKernel = Literal[
    "adaln_fwd",
    "adaln_bwd",
    "gated_adaln_fwd",
    "gated_adaln_bwd",
    "gated_fwd",
    "gated_bwd",
    "gelu_fwd",
    "gelu_bwd",
    "pack_fwd",
    "pack_bwd",
    "unpack",
    "merge_fwd",
    "merge_bwd",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTiles:
    """What one program holds at a time.

    Args:
        per_warp: elements that a warp holds; a tile is per_warp x num_warps of them.
        num_warps: of a program; None where a tile is one row, for as many warps as that takes.
        max_chunk: most rows that one program goes through, where a program goes through several tiles.
        evidence: what the figures rest on. record: key of the measurement behind `measured`.
    """

    per_warp: int
    num_warps: int | None = 4
    max_chunk: int = 256
    evidence: Evidence = "assumed"
    record: str | None = None

    @property
    def elements(self) -> int:
        """Elements of a tile that is not one row."""
        assert self.num_warps is not None
        return self.per_warp * self.num_warps


# At C = 1152 adaLN's rows take 1 warp, 2 for backward and for the fused forward, 4 for the fused backward. A program
# takes them one by one: short chunks, as the last one runs alone; backward pays for each with a slot to sum.
# The others: 16 bytes of bf16 for each thread of 4 warps, four times.
ROW_TILES: dict[RowKernel, RowTiles] = {
    "adaln_fwd": RowTiles(per_warp=1280, num_warps=None, max_chunk=32),
    "adaln_bwd": RowTiles(per_warp=640, num_warps=None),
    "gated_adaln_fwd": RowTiles(per_warp=640, num_warps=None, max_chunk=32),
    "gated_adaln_bwd": RowTiles(per_warp=320, num_warps=None),
    "gated_fwd": RowTiles(per_warp=1024),
    "gated_bwd": RowTiles(per_warp=1024),
    "gelu_fwd": RowTiles(per_warp=1024),
    "gelu_bwd": RowTiles(per_warp=1024),
    "pack_fwd": RowTiles(per_warp=1024),
    "pack_bwd": RowTiles(per_warp=1024),
    "unpack": RowTiles(per_warp=1024),
    "merge_fwd": RowTiles(per_warp=1024),
    "merge_bwd": RowTiles(per_warp=1024),
}
# What a campaign found for one length class; consulted before the above.
MEASURED_ROWS: dict[tuple[RowKernel, LengthClass], RowTiles] = {}

# Kernels in which a program goes through a chunk of rows, whose length is a choice too.
_CHUNKED = ("adaln", "gated", "gelu", "pack_bwd")


def row_tiles(kernel: RowKernel, rows: int) -> RowTiles:
    """The tiles a launch over this many rows (tokens of all samples) uses."""
    return MEASURED_ROWS.get((kernel, length_class(rows)), ROW_TILES[kernel])


def row_candidates(kernel: RowKernel, length: LengthClass) -> list[RowTiles]:
    """What a campaign should time, the constants in use first; few enough that all of them are timed."""
    own = MEASURED_ROWS.get((kernel, length), ROW_TILES[kernel])
    plain = replace(own, evidence="assumed", record=None)
    half, double = (replace(plain, per_warp=own.per_warp * 2**power // 2) for power in (0, 2))
    tried = [half, double]
    if own.num_warps is not None:
        # The same tile by twice as many warps.
        tried.append(replace(plain, per_warp=own.per_warp // 2, num_warps=2 * own.num_warps))
    if kernel.startswith(_CHUNKED):
        tried.append(replace(plain, max_chunk=own.max_chunk // 4))
    return [own, *tried]
