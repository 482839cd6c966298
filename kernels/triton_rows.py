"""What the Triton kernels over rows share: programs over segments of rows, and sums over a segment's rows.

x [B, S, C] is M = B S rows in N segments: the B samples, or those that cu_seqlens packs into one (then B = 1). Program
p owns rows [p CHUNK, (p + 1) CHUNK) and visits the segments in them in order, each with its own modulation row.

Sums over the rows of a segment are deterministic: program p writes its fp32 share of segment n to slot p + n of a
[slots, C] buffer, and a second kernel adds the slots of each segment in a fixed order. No two pairs (p, n) share a
slot, as along the rows every next pair is larger in p, in n or in both. Nothing depends on the GPU or its scheduling.

Row numbers are 64-bit by a cast on the range within a tile: a compiled loop counts in the type of its bounds, the
interpreter's counter is a Python integer that takes the type of what it meets.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longreel.kernels.triton_common import launch_on

# Assumed: fewest programs to keep a GPU of 132 multiprocessors busy.
MIN_PROGRAMS = 1056

# Assumed: slots and columns of a tile in the second stage.
SUM_SLOTS = 128
SUM_COLUMNS = 32


@triton.jit
def segment_start(cu_seqlens, i_n, seq_len):
    """First row of segment i_n (int64)."""
    if cu_seqlens is None:
        return i_n * seq_len
    else:
        return tl.load(cu_seqlens + i_n).to(tl.int64)


@triton.jit
def segment_of_row(cu_seqlens, row, seq_len, num_segments):
    """Segment that holds this row (int64): the last one that starts at or before it, so never an empty one."""
    if cu_seqlens is None:
        return row // seq_len
    else:
        low = row * 0
        high = low + num_segments
        while high - low > 1:
            middle = (low + high) // 2
            if tl.load(cu_seqlens + middle).to(tl.int64) <= row:
                low = middle
            else:
                high = middle
        return low


@triton.jit
def load_tile(p_x, o_row, o_col, m_row, C: tl.constexpr):
    """Rows o_row and columns o_col of a contiguous [M, C], in fp32; 0 where masked."""
    m_x = m_row[:, None] & (o_col < C)[None, :]
    return tl.load(p_x + o_row[:, None] * C + o_col[None, :], mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def store_tile(p_x, b_x, o_row, o_col, m_row, C: tl.constexpr):
    """Writes what load_tile reads, rounded to the buffer's dtype."""
    m_x = m_row[:, None] & (o_col < C)[None, :]
    tl.store(p_x + o_row[:, None] * C + o_col[None, :], b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def load_vector(p_x, o_col, C: tl.constexpr):
    """Columns o_col of one row of C, in fp32; 0 beyond C."""
    return tl.load(p_x + o_col, mask=o_col < C, other=0.0).to(tl.float32)


@triton.jit
def store_vector(p_x, b_x, o_col, C: tl.constexpr):
    """Writes what load_vector reads."""
    tl.store(p_x + o_col, b_x.to(p_x.dtype.element_ty), mask=o_col < C)


@triton.jit
def sum_slots_kernel(
    slots,
    out,
    cu_seqlens,
    seq_len,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[n] = sum of segment n's slots; 0 for an empty segment."""
    NUM_C: tl.constexpr = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0).to(tl.int64)
    i_n = pid // NUM_C
    o_col = (pid % NUM_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = segment_start(cu_seqlens, i_n, seq_len)
    end = segment_start(cu_seqlens, i_n + 1, seq_len)
    first = start // CHUNK + i_n
    # The last row's program, plus one; an empty segment has no slot.
    stop = tl.where(end > start, (end - 1) // CHUNK + 1 + i_n, first)
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for i in range(first, stop, BLOCK_P):
        o_slot = i + tl.arange(0, BLOCK_P).to(tl.int64)
        acc += load_tile(slots, o_slot, o_col, o_slot < stop, C)
    store_vector(out + i_n * C, tl.sum(acc, 0), o_col, C)


def split_columns(columns: int) -> tuple[int, int]:
    """Two powers of two that cover C columns with little waste: 1152 = 1024 + 128, 72 = 64 + 8, 64 = 32 + 32."""
    main = 1 << (columns.bit_length() - 1)
    if main == columns and columns > 1:
        main //= 2
    return main, triton.next_power_of_2(max(columns - main, 1))


def rows_per_program(rows: int, max_chunk: int, programs_per_row: int = 1, tile_rows: int = 1) -> int:
    """CHUNK: a power of two, one tile to max_chunk rows, so that MIN_PROGRAMS run if there are rows enough for them."""
    wanted = rows * programs_per_row // MIN_PROGRAMS
    return max(tile_rows, min(max_chunk, 1 << max(wanted.bit_length() - 1, 0)))


def count_segments(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """N for x [B, S, C]."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def unit_offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    """The same offsets side by side, as kernels read them."""
    return None if cu_seqlens is None else cu_seqlens.contiguous()


def unit_columns(rows: Tensor) -> Tensor:
    """Modulation rows [N, C] with a contiguous last dim and any row stride: a chunk of [N, 6 C] is not copied."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def new_slots(x: Tensor, rows: int, chunk: int, num_segments: int) -> Tensor:
    """An unwritten [slots, C] buffer for the sums of one output."""
    return torch.empty(triton.cdiv(rows, chunk) + num_segments, x.shape[-1], dtype=torch.float32, device=x.device)


def sum_slots(slots: Tensor, out: Tensor, cu_seqlens: Tensor | None, seq_len: int, chunk: int) -> Tensor:
    """Second stage: fills out [N, C] and returns it.

    Args:
        slots: from new_slots, filled by a first stage of this chunk.
        seq_len: rows of a segment where cu_seqlens is None.
    """
    num_segments, columns = out.shape
    if out.numel():
        grid = (triton.cdiv(columns, SUM_COLUMNS) * num_segments,)
        with launch_on(out):
            sum_slots_kernel[grid](
                slots, out, unit_offsets(cu_seqlens), seq_len, chunk, columns, SUM_SLOTS, SUM_COLUMNS, num_warps=4
            )
    return out
