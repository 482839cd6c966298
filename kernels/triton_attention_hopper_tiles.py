"""What producer and consumers of the Hopper forward kernel share: the rows of a tile, and the layout of a tail.

As triton_attention_tiles for the portable kernels, with 32-bit rows: TMA multiplies them by their strides in hardware.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def core_matrices(rows, transposed=False):
    """Layout of [rows, 16] without swizzle, as wgmma reads it: two stacks of 8 x 8 matrices, a row of one 16 bytes.

    The first rows * 8 values are columns 0 to 7: what TMA writes for a box of 8 columns. Transposed: of [16, rows].
    """
    bases = [[0, 1], [0, 2], [0, 4]]
    row = 1
    while row < rows:
        bases.append([row, 0])
        row *= 2
    bases.append([0, 8])
    if transposed:
        bases = [basis[::-1] for basis in bases]
    return gl.SharedLinearLayout(bases, alignment=128)


@gluon.jit
def tile_bounds(
    i_tile, cu_q, cu_k, q_len, k_len, num_segments, search_steps, BLOCK: gl.constexpr, VARLEN: gl.constexpr
):
    """First query row of a tile, end of its rows, first key row and end of the keys; see triton_attention_tiles."""
    first = i_tile * BLOCK
    end = q_len
    k_start = i_tile * 0
    k_end = k_len
    if VARLEN:
        low = i_tile * 0
        high = low + num_segments
        for _ in range(search_steps):
            middle = (low + high) // 2
            owns = gl.load(cu_q + middle).to(gl.int32) // BLOCK + middle <= i_tile
            low = gl.where(owns, middle, low)
            high = gl.where(owns, high, middle)
        start = gl.load(cu_q + low).to(gl.int32)
        end = gl.load(cu_q + low + 1).to(gl.int32)
        first = start + (i_tile - start // BLOCK - low) * BLOCK
        k_start = gl.load(cu_k + low).to(gl.int32)
        k_end = gl.load(cu_k + low + 1).to(gl.int32)
    return first, end, k_start, k_end
