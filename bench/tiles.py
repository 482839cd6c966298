"""Attention tile constants that replace the built-in ones for a while: for tuning, and to measure what it chose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longreel.kernels import triton_attention_tuning as tuning

# (direction, width, constants as JSON): sent to workers, and hashed into a record's key.
Tiles = tuple[tuple[str, int, str], ...]


def tiles_entry(direction: str, width: int, tiles: tuning.AttentionTiles) -> tuple[str, int, str]:
    """One row of Tiles."""
    return direction, width, json.dumps(asdict(tiles), sort_keys=True)


def read_tiles(path: Path) -> Tiles:
    """The constants that a tuning run chose over the built-in ones.

    Raises:
        ValueError: the file does not hold what tune writes. OSError: it cannot be read.
    """
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or "chosen" not in found:
        raise ValueError(f"{path} is not a tuning result: it has no `chosen`")
    return tuple((row["direction"], row["width"], json.dumps(row["tiles"], sort_keys=True)) for row in found["chosen"])


@contextmanager
def use_tiles(rows: Tiles) -> Iterator[None]:
    """Within this context the Triton attention kernels launch with these constants."""
    before = dict(tuning.TILES)
    replaced: dict[Any, tuning.AttentionTiles] = {
        (direction, width): tuning.AttentionTiles(**json.loads(text)) for direction, width, text in rows
    }
    tuning.TILES.update(replaced)
    try:
        yield
    finally:
        tuning.TILES.clear()
        tuning.TILES.update(before)
