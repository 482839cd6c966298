"""Every tuning constant of the Triton kernels with what it rests on, as a table of Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from longreel.kernels.triton_attention_tuning import (
    DELTA_WARPS,
    HOPPER_TILES,
    LONG,
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
    for kernels, constants in _plain_constants().items():
        shown = ", ".join(f"{name} {value}" for name, value in constants.items())
        yield kernels, "all", "all", shown, "assumed"


def _plain_constants() -> dict[str, dict[str, Any]]:
    """Constants that no campaign varies, by the kernels that they serve."""
    from longreel.kernels import triton_adaln, triton_residual, triton_rows, triton_sp_layout

    return {
        "length class long, from keys or rows": {"LONG": LONG},
        "adaLN's": {"MAX_WARPS": triton_adaln.MAX_WARPS},
        "gated residual's, bias + GELU's": {"TILE_COLUMNS": triton_residual.TILE_COLUMNS},
        "pack_bwd": {"TILE_COLUMNS": triton_sp_layout.TILE_COLUMNS},
        "pack_fwd, unpack": {"VECTOR": triton_sp_layout.VECTOR},
        "over chunks of rows": {"MIN_PROGRAMS": triton_rows.MIN_PROGRAMS},
        "sum_slots": {"SUM_SLOTS": triton_rows.SUM_SLOTS, "SUM_COLUMNS": triton_rows.SUM_COLUMNS},
    }


def _values(tiles: Any) -> tuple[str, str]:
    fields = asdict(tiles)
    evidence, record = fields.pop("evidence"), fields.pop("record")
    shown = ", ".join(f"{name} {value}" for name, value in fields.items() if value is not None)
    return shown, evidence if record is None else f"{evidence} ({record})"
