"""Attention tile constants that replace the built-in ones for a while: for tuning, and to measure what it chose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from longreel.kernels import triton_attention_tuning as tuning
from longreel.kernels.triton_attention_tuning import AttentionTiles, HopperTiles, LengthClass

# A kernel with constants of its own: the directions of the portable kernels, and the warp-specialised forward.
Kernel = Literal["forward", "dkdv", "dq", "fused", "hopper"]
AnyTiles = AttentionTiles | HopperTiles
# (kernel, width, length class, constants as JSON): sent to workers, and hashed into a record's key.
TilesRow = tuple[Kernel, int, LengthClass, str]
Tiles = tuple[TilesRow, ...]


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
    if kernel == "hopper":
        return min(widest for widest in tuning.HOPPER_TILES if widest >= head_dim)
    # Imports Triton, which is optional.
    from longreel.kernels.triton_attention_tiles import split_head_dim

    needed = sum(split_head_dim(head_dim))
    return min(widest for direction, widest in tuning.TILES if direction == kernel and widest >= needed)


def candidates(kernel: Kernel, width: int, length: LengthClass) -> list[AnyTiles]:
    """What is worth timing, the constants in use first."""
    if kernel == "hopper":
        return list(tuning.hopper_candidates(width, length))
    own, *others = tuning.candidates(kernel, width, length)
    # Plans do not change a launch: what differs in nothing else is the constants in use again.
    plan = own.planned_programs
    return [own, *(tiles for tiles in others if replace(tiles, planned_programs=plan, evidence=own.evidence) != own)]


@contextmanager
def use_tiles(rows: Tiles) -> Iterator[None]:
    """Within this context the Triton attention kernels launch with these constants."""
    before, before_hopper = dict(tuning.MEASURED), dict(tuning.MEASURED_HOPPER)
    for kernel, width, length, text in rows:
        if kernel == "hopper":
            tuning.MEASURED_HOPPER[width, length] = HopperTiles(**json.loads(text))
        else:
            tuning.MEASURED[kernel, width, length] = AttentionTiles(**json.loads(text))
    try:
        yield
    finally:
        tuning.MEASURED.clear()
        tuning.MEASURED.update(before)
        tuning.MEASURED_HOPPER.clear()
        tuning.MEASURED_HOPPER.update(before_hopper)
