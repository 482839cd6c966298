"""Gated residual z = x + gate * y in Triton, forward and backward.

Shapes: x, y, z [B, S, C] contiguous; gate [N, C] with any row stride, N samples or packed segments.
Tiles of rows x 128 columns (1152 = 9 x 128), the gate's columns held while the rows pass; dgate through slots
(triton_rows). Bytes moved, n = B S C elements of e bytes: 3 n e forward, 3 n e backward.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longreel.kernels.triton_common import launch_on
from longreel.kernels.triton_rows import (
    count_segments,
    load_tile,
    load_vector,
    new_slots,
    rows_per_program,
    segment_of_row,
    segment_start,
    store_tile,
    store_vector,
    sum_slots,
    unit_columns,
    unit_offsets,
)
from longreel.kernels.triton_rows_tuning import RowKernel, row_tiles

# Assumed: columns of a tile, 256 bytes of bf16 in a row.
TILE_COLUMNS = 128


@triton.jit
def gated_residual_fwd_kernel(
    x,
    y,
    gate,
    z,
    cu_seqlens,
    num_rows,
    seq_len,
    num_segments,
    stride_gate,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    NUM_C: tl.constexpr = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // NUM_C * CHUNK
    o_col = (pid % NUM_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    last = tl.minimum(row + CHUNK, num_rows)
    i_n = segment_of_row(cu_seqlens, row, seq_len, num_segments)
    while row < last:
        end = tl.minimum(last, segment_start(cu_seqlens, i_n + 1, seq_len))
        b_gate = load_vector(gate + i_n * stride_gate, o_col, C)
        for i in range(row, end, ROWS):
            o_row = i + tl.arange(0, ROWS).to(tl.int64)
            m_row = o_row < end
            b_x = load_tile(x, o_row, o_col, m_row, C)
            b_y = load_tile(y, o_row, o_col, m_row, C)
            store_tile(z, b_x + b_gate[None, :] * b_y, o_row, o_col, m_row, C)
        row = end
        i_n += 1


@triton.jit
def gated_residual_bwd_kernel(
    dz,
    y,
    gate,
    dy,
    slots,
    cu_seqlens,
    num_rows,
    seq_len,
    num_segments,
    stride_gate,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    NUM_C: tl.constexpr = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0).to(tl.int64)
    i_p = pid // NUM_C
    row = i_p * CHUNK
    o_col = (pid % NUM_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    last = tl.minimum(row + CHUNK, num_rows)
    i_n = segment_of_row(cu_seqlens, row, seq_len, num_segments)
    while row < last:
        end = tl.minimum(last, segment_start(cu_seqlens, i_n + 1, seq_len))
        b_gate = load_vector(gate + i_n * stride_gate, o_col, C)
        # Summed over rows once, at the end: until then every thread adds to its own elements.
        acc = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
        for i in range(row, end, ROWS):
            o_row = i + tl.arange(0, ROWS).to(tl.int64)
            m_row = o_row < end
            b_dz = load_tile(dz, o_row, o_col, m_row, C)
            acc += b_dz * load_tile(y, o_row, o_col, m_row, C)
            store_tile(dy, b_gate[None, :] * b_dz, o_row, o_col, m_row, C)
        store_vector(slots + (i_p + i_n) * C, tl.sum(acc, 0), o_col, C)
        row = end
        i_n += 1


def gated_residual_fwd(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """As reference.gated_residual_fwd."""
    x, y, gate = x.contiguous(), y.contiguous(), unit_columns(gate)
    z = x.new_empty(x.shape)
    if not z.numel():
        return z
    rows, grid, options = _launch(x, "gated_fwd")
    with launch_on(x):
        gated_residual_fwd_kernel[grid](
            x,
            y,
            gate,
            z,
            unit_offsets(cu_seqlens),
            rows,
            x.shape[1],
            count_segments(x, cu_seqlens),
            gate.stride(0),
            **options,
        )
    return z


def gated_residual_bwd(dz: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """As reference.gated_residual_bwd."""
    dz, y, gate = dz.contiguous(), y.contiguous(), unit_columns(gate)
    dy = y.new_empty(y.shape)
    rows, grid, options = _launch(y, "gated_bwd")
    chunk = options["CHUNK"]
    num_segments = count_segments(y, cu_seqlens)
    slots = new_slots(y, rows, chunk, num_segments)
    if dy.numel():
        with launch_on(y):
            gated_residual_bwd_kernel[grid](
                dz,
                y,
                gate,
                dy,
                slots,
                unit_offsets(cu_seqlens),
                rows,
                y.shape[1],
                num_segments,
                gate.stride(0),
                **options,
            )
    return dy, sum_slots(slots, gate.new_empty(gate.shape), cu_seqlens, y.shape[1], chunk)


def _launch(x: Tensor, kernel: RowKernel) -> tuple[int, tuple[int], dict[str, int]]:
    """(rows, grid, options); column blocks of a row chunk are neighbouring programs."""
    rows, columns = x.shape[0] * x.shape[1], x.shape[2]
    options = tile_options(kernel, rows, columns)
    return rows, (triton.cdiv(columns, TILE_COLUMNS) * triton.cdiv(rows, options["CHUNK"]),), options


def tile_options(kernel: RowKernel, rows: int, columns: int) -> dict[str, int]:
    """Launch options over rows of this many columns; bias-GELU's kernels take the same."""
    tiles = row_tiles(kernel, rows)
    tile_rows = max(1, tiles.elements // TILE_COLUMNS)
    chunk = rows_per_program(rows, tiles.max_chunk, triton.cdiv(columns, TILE_COLUMNS), tile_rows)
    assert tiles.num_warps is not None
    return {
        "CHUNK": chunk,
        "ROWS": tile_rows,
        "C": columns,
        "BLOCK_C": TILE_COLUMNS,
        "num_warps": tiles.num_warps,
    }
