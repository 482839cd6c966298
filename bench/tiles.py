"""Tile constants that replace the kernels' own for a while: for tuning, and to measure what it chose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast

from longreel.kernels import triton_attention_tuning as tuning
from longreel.kernels import triton_rows_tuning as rows_tuning
from longreel.kernels.triton_attention_tuning import AttentionTiles, HopperTiles, LengthClass
from longreel.kernels.triton_rows_tuning import RowKernel, RowTiles

# A kernel with constants of its own: attention's portable ones and its warp-specialised forward, and those over rows.
AttentionKernel = Literal["forward", "dkdv", "dq", "fused", "hopper"]
Kernel = AttentionKernel | RowKernel
AnyTiles = AttentionTiles | HopperTiles | RowTiles
# (kernel, width, length class, constants as JSON): sent to workers, and hashed into a record's key.
TilesRow = tuple[Kernel, int, LengthClass, str]
# Width of the kernels over rows: their constants serve every one.
ANY_WIDTH = 0
Tiles = tuple[TilesRow, ...]


def is_row_kernel(kernel: Kernel) -> TypeGuard[RowKernel]:
    """Whether it is one of the memory-bound kernels."""
    return kernel in rows_tuning.ROW_TILES


def tiles_row(kernel: Kernel, width: int, length: LengthClass, tiles: AnyTiles) -> TilesRow:
    """One row of Tiles. width: what the kernel's constants are listed under."""
    return kernel, width, length, json.dumps(asdict(tiles), sort_keys=True)


def read_tiles(path: Path) -> Tiles:
    """The constants that a tuning run chose.

    Raises:
        ValueError: the file does not hold what a tuning run writes. OSError: it cannot be read.
    """
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or "chosen" not in found:
        raise ValueError(f"{path} is not a tuning result: it has no `chosen`")
    rows = ((r["kernel"], r["width"], r["length"], json.dumps(r["tiles"], sort_keys=True)) for r in found["chosen"])
    return tuple(rows)


def listed_width(kernel: Kernel, head_dim: int) -> int:
    """The width under which a kernel's constants for a head_dim are listed."""
    if is_row_kernel(kernel):
        return ANY_WIDTH
    if kernel == "hopper":
        return min(widest for widest in tuning.HOPPER_TILES if widest >= head_dim)
    # Imports Triton, which is optional.
    from longreel.kernels.triton_attention_tiles import split_head_dim

    needed = sum(split_head_dim(head_dim))
    return min(widest for direction, widest in tuning.TILES if direction == kernel and widest >= needed)


def candidates(kernel: Kernel, width: int, length: LengthClass) -> list[AnyTiles]:
    """What is worth timing, the constants in use first."""
    if is_row_kernel(kernel):
        return list(rows_tuning.row_candidates(kernel, length))
    if kernel == "hopper":
        return list(tuning.hopper_candidates(width, length))
    own, *others = tuning.candidates(cast(tuning.Direction, kernel), width, length)
    # Plans do not change a launch: what differs in nothing else is the constants in use again.
    plan = own.planned_programs
    return [own, *(tiles for tiles in others if replace(tiles, planned_programs=plan, evidence=own.evidence) != own)]


@contextmanager
def use_tiles(rows: Tiles) -> Iterator[None]:
    """Within this context the Triton kernels launch with these constants."""
    tables: tuple[dict[Any, Any], ...] = (tuning.MEASURED, tuning.MEASURED_HOPPER, rows_tuning.MEASURED_ROWS)
    before = [dict(table) for table in tables]
    for kernel, width, length, text in rows:
        if is_row_kernel(kernel):
            rows_tuning.MEASURED_ROWS[kernel, length] = RowTiles(**json.loads(text))
        elif kernel == "hopper":
            tuning.MEASURED_HOPPER[width, length] = HopperTiles(**json.loads(text))
        else:
            tuning.MEASURED[cast(tuning.Direction, kernel), width, length] = AttentionTiles(**json.loads(text))
    try:
        yield
    finally:
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)
