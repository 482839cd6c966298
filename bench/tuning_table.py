"""Every tuning constant of the Triton kernels with what it rests on, as a table of Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from longreel.kernels.triton_attention_tuning import (
    DELTA_WARPS,
    HOPPER_TILES,
    MEASURED,
    MEASURED_HOPPER,
    TILES,
    TILES_FP32,
)
from longreel.kernels.triton_rows_tuning import MEASURED_ROWS, ROW_TILES


def tuning_table() -> list[str]:
    """Lines of a table: kernel, what it serves, length class, values, evidence with the record it names."""
    lines = ["| kernel | serves | lengths | constants | evidence |", "|" + " --- |" * 5]
    lines += [f"| {' | '.join(row)} |" for row in _rows()]
    return lines


def _rows() -> Iterator[tuple[str, str, str, str, str]]:
    for (direction, width), tiles in TILES.items():
        yield f"attention {direction}", f"{width} columns and fewer", "all", *_values(tiles)
    for (direction, width, lengths), tiles in MEASURED.items():
        yield f"attention {direction}", f"{width} columns and fewer", lengths, *_values(tiles)
    yield "attention, all", "fp32", "all", *_values(TILES_FP32)
    yield "attention delta", "all", "all", f"num_warps {DELTA_WARPS}", "assumed"
    for head_dim, hopper in HOPPER_TILES.items():
        yield "attention forward, triton-hopper", f"head_dim {head_dim} and less", "all", *_values(hopper)
    for (head_dim, lengths), hopper in MEASURED_HOPPER.items():
        yield "attention forward, triton-hopper", f"head_dim {head_dim} and less", lengths, *_values(hopper)
    for kernel, rows in ROW_TILES.items():
        yield kernel, "all", "all", *_values(rows)
    for (kernel, lengths), rows in MEASURED_ROWS.items():
        yield kernel, "all", lengths, *_values(rows)


def _values(tiles: Any) -> tuple[str, str]:
    fields = asdict(tiles)
    evidence, record = fields.pop("evidence"), fields.pop("record")
    shown = ", ".join(f"{name} {value}" for name, value in fields.items() if value is not None)
    return shown, evidence if record is None else f"{evidence} ({record})"
