"""Layout changes around all-to-all in Triton: copies at the memory's speed, one of them adding the QKV bias.

With R = B s G rows, W = h D and C = G H D, the exchanged [P, B, s, G, h, D] is [P, R, W], and the tokens' [B, s, G, H,
D] is [R, P, W]: packing heads swaps two dims. [B, S, G, h, D] differs from [P, B, s, G, h, D] in whole runs of s G W.
Blocks are flat ranges of what is written, so no lane idles whatever W is. W is a compile-time constant: the compiler
sees that 8 elements in a row stay together where 8 divides it, and moves 16 bytes at a time.
Bytes moved, n elements of e bytes: 2 n e each way; the bias gradient's partial sums add 4 C per chunk of tokens.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from longreel.kernels.triton_common import launch_on
from longreel.kernels.triton_rows import load_tile, new_slots, rows_per_program, sum_slots
from longreel.kernels.triton_rows_tuning import RowKernel, row_tiles

# Assumed: most elements that stay together, which the compiler is told: it does not follow a remainder's divisibility.
VECTOR = 16
# Assumed: widths that a tile of the pass that also sums may have.
TILE_COLUMNS = (128, 64, 32)


@triton.jit
def pack_heads_kernel(
    x,
    bias,
    packed,
    num_rows,
    num_blocks,
    P: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """packed [P, R, W] = x [R, P, W] + bias [G, P, W], row r having bias r % G; bias may be None."""
    pid = tl.program_id(0).to(tl.int64)
    i_p = pid // num_blocks
    start = (pid % num_blocks) * BLOCK
    row = start // W
    # Indices inside the block are 32-bit: one division by a constant each.
    o_e = tl.multiple_of((start % W).to(tl.int32), VEC) + tl.arange(0, BLOCK)
    o_r = o_e // W
    o_w = o_e % W
    m_x = row + o_r < num_rows
    b_x = tl.load(x + (row + o_r.to(tl.int64)) * (P * W) + i_p * W + o_w, mask=m_x, other=0.0)
    if bias is not None:
        o_g = ((row % G).to(tl.int32) + o_r) % G
        b_bias = tl.load(bias + o_g.to(tl.int64) * (P * W) + i_p * W + o_w, mask=m_x, other=0.0)
        b_x = (b_x.to(tl.float32) + b_bias.to(tl.float32)).to(packed.dtype.element_ty)
    tl.store(packed + (i_p * num_rows + row + o_r) * W + o_w, b_x, mask=m_x)


@triton.jit
def unpack_heads_kernel(packed, x, num_rows, P: tl.constexpr, W: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """x [R, P, W] = packed [P, R, W]."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    piece = start // W
    row = piece // P
    o_e = tl.multiple_of((start % W).to(tl.int32), VEC) + tl.arange(0, BLOCK)
    o_w = o_e % W
    o_piece = (piece % P).to(tl.int32) + o_e // W
    o_row = row + o_piece // P
    o_p = (o_piece % P).to(tl.int64)
    m_x = o_row < num_rows
    b_x = tl.load(packed + (o_p * num_rows + o_row) * W + o_w, mask=m_x, other=0.0)
    tl.store(x + (o_row * P + o_p) * W + o_w, b_x, mask=m_x)


@triton.jit
def pack_heads_bwd_kernel(
    dpacked,
    dx,
    slots,
    num_tokens,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx [M, G, P, W] = dpacked [P, M, G, W] for M tokens, and each chunk's sum over them in slots [., G, P, W]."""
    NUM_C: tl.constexpr = tl.cdiv(G * W, BLOCK_C)
    pid = tl.program_id(0).to(tl.int64)
    i_p = pid // NUM_C % P
    i_chunk = pid // NUM_C // P
    token = i_chunk * CHUNK
    o_col = (pid % NUM_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_col = o_col < G * W
    # Where this part's columns lie in a row of x.
    o_x = (o_col // W) * (P * W) + i_p * W + o_col % W
    acc = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    for i in range(token, tl.minimum(token + CHUNK, num_tokens), ROWS):
        o_m = i + tl.arange(0, ROWS).to(tl.int64)
        m_row = o_m < num_tokens
        b_dx = load_tile(dpacked + i_p * num_tokens * (G * W), o_m, o_col, m_row, G * W)
        acc += b_dx
        m_x = m_row[:, None] & m_col[None, :]
        tl.store(dx + o_m[:, None] * (G * P * W) + o_x[None, :], b_dx.to(dx.dtype.element_ty), mask=m_x)
    tl.store(slots + i_chunk * (G * P * W) + o_x, tl.sum(acc, 0), mask=m_col)


@triton.jit
def move_tokens_kernel(
    whole,
    packed,
    batch,
    tokens,
    rows,
    num_blocks,
    Z: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """packed [P, B, s, Z] from whole [B, T, Z], zero where there is no token, or back for those there are."""
    pid = tl.program_id(0).to(tl.int64)
    # 64-bit: a rank's rows of all heads pass 2^31 elements.
    run = (pid * 0 + rows) * Z
    i_pb = pid // num_blocks
    i_p = i_pb // batch
    o_e = (pid % num_blocks) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    first = i_p * rows
    m_run = o_e < run
    m_there = o_e < tl.minimum(tokens - first, rows) * Z
    p_whole = whole + ((i_pb % batch) * tokens + first) * Z + o_e
    p_packed = packed + i_pb * run + o_e
    if PACK:
        tl.store(p_packed, tl.load(p_whole, mask=m_there, other=0.0), mask=m_run)
    else:
        tl.store(p_whole, tl.load(p_packed, mask=m_there, other=0.0), mask=m_there)


def sp_pack_heads_fwd(x: Tensor, bias: Tensor | None, num_ranks: int) -> Tensor:
    """As reference.sp_pack_heads_fwd."""
    batch, s, parts, heads, head_dim = x.shape
    x = x.contiguous()
    packed = x.new_empty(num_ranks, batch, s, parts, heads // num_ranks, head_dim)
    if packed.numel():
        rows, width = batch * s * parts, heads // num_ranks * head_dim
        block = block_options("pack_fwd", batch * s)
        num_blocks = triton.cdiv(rows * width, block["BLOCK"])
        with launch_on(x):
            pack_heads_kernel[(num_ranks * num_blocks,)](
                x,
                None if bias is None else bias.contiguous(),
                packed,
                rows,
                num_blocks,
                P=num_ranks,
                G=parts,
                W=width,
                VEC=math.gcd(width, VECTOR),
                **block,
            )
    return packed


def sp_unpack_heads_fwd(packed: Tensor) -> Tensor:
    """As reference.sp_unpack_heads_fwd."""
    ranks, batch, s, parts, heads, head_dim = packed.shape
    packed = packed.contiguous()
    x = packed.new_empty(batch, s, parts, ranks * heads, head_dim)
    if x.numel():
        width = heads * head_dim
        block = block_options("unpack", batch * s)
        with launch_on(x):
            unpack_heads_kernel[(triton.cdiv(x.numel(), block["BLOCK"]),)](
                packed,
                x,
                batch * s * parts,
                P=ranks,
                W=width,
                VEC=math.gcd(width, VECTOR),
                **block,
            )
    return x


def sp_pack_heads_bwd(dpacked: Tensor) -> tuple[Tensor, Tensor]:
    """As reference.sp_pack_heads_bwd."""
    ranks, batch, s, parts, heads, head_dim = dpacked.shape
    dpacked = dpacked.contiguous()
    dx = dpacked.new_empty(batch, s, parts, ranks * heads, head_dim)
    columns = parts * ranks * heads * head_dim
    if not dx.numel():
        return dx, dpacked.new_zeros(columns)
    tokens, width = batch * s, heads * head_dim
    tiles = row_tiles("pack_bwd", tokens)
    tile = tile_options(parts * width, tokens)
    num_c = ranks * triton.cdiv(parts * width, tile["BLOCK_C"])
    chunk = rows_per_program(tokens, tiles.max_chunk, num_c, tile["ROWS"])
    slots = new_slots(dx.view(-1, columns), tokens, chunk, 1)
    with launch_on(dx):
        pack_heads_bwd_kernel[(num_c * triton.cdiv(tokens, chunk),)](
            dpacked, dx, slots, tokens, CHUNK=chunk, **tile, P=ranks, G=parts, W=width
        )
    # One segment: all tokens.
    dbias = sum_slots(slots, dpacked.new_empty(1, columns), None, tokens, chunk)
    return dx, dbias.view(columns)


def sp_pack_tokens_fwd(x: Tensor, num_ranks: int, rows: int) -> Tensor:
    """As reference.sp_pack_tokens_fwd."""
    x = x.contiguous()
    packed = x.new_empty(num_ranks, x.shape[0], rows, *x.shape[2:])
    _move_tokens(x, packed, pack=True)
    return packed


def sp_unpack_tokens_fwd(packed: Tensor, tokens: int) -> Tensor:
    """As reference.sp_unpack_tokens_fwd."""
    packed = packed.contiguous()
    x = packed.new_empty(packed.shape[1], tokens, *packed.shape[3:])
    _move_tokens(x, packed, pack=False)
    return x


def tile_options(columns: int, tokens: int) -> dict[str, int]:
    """Launch options of the summing pass over this many columns of one rank: the width that wastes least."""
    tiles = row_tiles("pack_bwd", tokens)
    block = min(TILE_COLUMNS, key=lambda width: triton.cdiv(columns, width) * width)
    assert tiles.num_warps is not None
    return {"ROWS": max(1, tiles.elements // block), "BLOCK_C": block, "num_warps": tiles.num_warps}


def block_options(kernel: RowKernel, tokens: int) -> dict[str, int]:
    """Launch options of a pass over a flat range."""
    tiles = row_tiles(kernel, tokens)
    assert tiles.num_warps is not None
    return {"BLOCK": tiles.elements, "num_warps": tiles.num_warps}


def _move_tokens(whole: Tensor, packed: Tensor, *, pack: bool) -> None:
    """Fills packed [P, B, s, ...] from whole [B, T, ...] where pack, else whole from packed; both contiguous."""
    ranks, batch, rows = packed.shape[:3]
    width = packed.shape[3:].numel()
    # A whole of no tokens is still packed: to zeros.
    if not packed.numel() or not (pack or whole.numel()):
        return
    # A plain copy of runs, as unpacking heads is.
    block = block_options("unpack", batch * whole.shape[1])
    num_blocks = triton.cdiv(rows * width, block["BLOCK"])
    with launch_on(packed):
        move_tokens_kernel[(ranks * batch * num_blocks,)](
            whole, packed, batch, whole.shape[1], rows, num_blocks, Z=width, PACK=pack, **block
        )
