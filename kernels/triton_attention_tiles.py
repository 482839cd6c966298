"""What the Triton attention kernels share: how head_dim is split, which rows a program owns, how a tile is addressed.

Shape letters: B batch, H heads, S query rows, T key rows, D head_dim = part of D0 columns + part of D1 columns.
All addresses are 64-bit. Strides arrive in units of ALIGN elements: the multiplication back tells the compiler what
they divide by, which a stride of 72 (a multiple of 8, not of 16) does not show by itself; without it loads fall to
2 bytes.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

# tl.dot takes no operand dimension below this one.
MIN_DOT = 16


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Powers of two (D0, D1), D1 possibly 0, with the smallest sum that covers head_dim: 72 gives (64, 16).

    Columns from head_dim on are masked. Each part is at least 16, the smallest dimension of tl.dot.
    """
    whole = max(MIN_DOT, triton.next_power_of_2(head_dim))
    first = whole // 2
    rest = max(MIN_DOT, triton.next_power_of_2(head_dim - first)) if head_dim > first else 0
    return (first, rest) if first >= MIN_DOT and first + rest < whole else (whole, 0)


@triton.jit
def widen(stride, ALIGN: tl.constexpr):
    """A stride in elements, 64-bit, from one in units of ALIGN; also a row from the number of a tile of ALIGN rows."""
    return tl.full((), ALIGN, tl.int64) * stride


@triton.jit
def tile_bounds(
    i_tile,
    cu_rows,
    cu_others,
    num_rows,
    num_others,
    num_segments,
    search_steps,
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """First row of a tile, end of its rows, start and end of the rows it meets on the other side, and its segment.

    Packed: segment n owns the tile numbers from cu_rows[n] // BLOCK + n on, which leaves room for all its tiles
    wherever it starts, and which the device finds by bisection, with no prefix sum and no host. Numbers that no tile
    needs get a first row that is not below the end.
    """
    if VARLEN:
        low = i_tile * 0
        high = low + num_segments
        for _ in range(search_steps):
            middle = (low + high) // 2
            owns = tl.load(cu_rows + middle).to(tl.int64) // BLOCK + middle <= i_tile
            low = tl.where(owns, middle, low)
            high = tl.where(owns, high, middle)
        start = tl.load(cu_rows + low).to(tl.int64)
        end = tl.load(cu_rows + low + 1).to(tl.int64)
        first = start + (i_tile - start // BLOCK - low) * BLOCK
        other_start = tl.load(cu_others + low).to(tl.int64)
        other_end = tl.load(cu_others + low + 1).to(tl.int64)
        segment = low
    else:
        first = i_tile * BLOCK
        end = i_tile * 0 + num_rows
        other_start = i_tile * 0
        other_end = i_tile * 0 + num_others
        segment = i_tile * 0
    return first, end, other_start, other_end, segment


@triton.jit
def program_tile(num_tiles, num_heads):
    """(tile, batch, head) of this program, 64-bit; programs of one head are neighbours and share its keys in L2."""
    i_program = tl.program_id(0)
    i_pair = i_program // num_tiles
    i_tile = (i_program % num_tiles).to(tl.int64)
    return i_tile, (i_pair // num_heads).to(tl.int64), (i_pair % num_heads).to(tl.int64)


@triton.jit
def load_tile(p_tile, m_rows, m_columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile with zeros where it is masked; what needs no mask gets none."""
    if MASK_ROWS and MASK_COLUMNS:
        b_tile = tl.load(p_tile, mask=m_rows[:, None] & m_columns[None, :], other=0.0)
    elif MASK_ROWS:
        b_tile = tl.load(p_tile, mask=m_rows[:, None], other=0.0)
    elif MASK_COLUMNS:
        b_tile = tl.load(p_tile, mask=m_columns[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def add_tile(p_tile, b_tile, m_rows, m_columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """Atomic additions of a tile, in no order; what needs no mask gets none."""
    if MASK_ROWS and MASK_COLUMNS:
        tl.atomic_add(p_tile, b_tile, mask=m_rows[:, None] & m_columns[None, :], sem="relaxed")
    elif MASK_ROWS:
        tl.atomic_add(p_tile, b_tile, mask=m_rows[:, None], sem="relaxed")
    elif MASK_COLUMNS:
        tl.atomic_add(p_tile, b_tile, mask=m_columns[None, :], sem="relaxed")
    else:
        tl.atomic_add(p_tile, b_tile, sem="relaxed")
