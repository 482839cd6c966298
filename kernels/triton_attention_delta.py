"""The first kernel of attention's backward: delta = rowsum(dout * out) - dlse, and a padded copy of it and the lse.

8 bytes a row and head: without the copy their loads cost the other kernels registers that spill.
Traffic: out, dout, lse and dlse once.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from longreel.kernels.triton_attention_tiles import load_tile, program_tile, tile_bounds, widen

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_delta_kernel(
    out,
    dout,
    lse,
    dlse,
    rows,
    cu_q,
    s_ob,
    s_os,
    s_oh,
    s_gb,
    s_gs,
    s_gh,
    s_lb,
    s_lh,
    s_ls,
    num_heads,
    q_len,
    num_tiles,
    num_segments,
    search_steps,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PAD: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """rows [2, B, H, num_tiles * PAD]: lse (half precision: in base 2) and delta, every segment's from a multiple of
    PAD on.

    So every tile of PAD query rows reads its values aligned and unmasked. Rows that are not there get an lse of +inf,
    which makes their P zero, and a delta of 0; so do rows without weight, whose lse is -inf. dlse's strides are in
    elements.
    """
    i_tile, i_b, i_h = program_tile(num_tiles, num_heads)
    row, q_end, _, _, _ = tile_bounds(i_tile, cu_q, cu_q, q_len, q_len, num_segments, search_steps, PAD, VARLEN)
    o_m = row + tl.arange(0, PAD)
    m_m = o_m < q_end
    o_d0 = tl.arange(0, D0)
    m_d0 = o_d0 < HEAD_DIM
    p_o = out + i_b * widen(s_ob, ALIGN) + i_h * widen(s_oh, ALIGN) + o_m[:, None] * widen(s_os, ALIGN)
    p_g = dout + i_b * widen(s_gb, ALIGN) + i_h * widen(s_gh, ALIGN) + o_m[:, None] * widen(s_gs, ALIGN)
    b_o0 = load_tile(p_o + o_d0[None, :], m_m, m_d0, True, D0 > HEAD_DIM).to(tl.float32)
    b_g0 = load_tile(p_g + o_d0[None, :], m_m, m_d0, True, D0 > HEAD_DIM).to(tl.float32)
    b_delta = tl.sum(b_o0 * b_g0, 1)
    if D1 > 0:
        o_d1 = D0 + tl.arange(0, D1)
        m_d1 = o_d1 < HEAD_DIM
        b_o1 = load_tile(p_o + o_d1[None, :], m_m, m_d1, True, D0 + D1 > HEAD_DIM).to(tl.float32)
        b_g1 = load_tile(p_g + o_d1[None, :], m_m, m_d1, True, D0 + D1 > HEAD_DIM).to(tl.float32)
        b_delta += tl.sum(b_o1 * b_g1, 1)
    if HAS_DLSE:
        p_l = dlse + i_b * widen(s_lb, 1) + i_h * widen(s_lh, 1) + o_m * widen(s_ls, 1)
        b_delta -= tl.load(p_l, mask=m_m, other=0.0)
    b_lse = tl.load(lse + (i_b * num_heads + i_h) * q_len + o_m, mask=m_m, other=float("inf"))
    # Scores that are all -inf less an lse of -inf would be NaN.
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    if out.dtype.element_ty != tl.float32:
        b_lse = b_lse * LOG2_E
    # Programs are numbered (batch, head, tile), and so are the rows they own.
    p_rows = rows + widen(tl.program_id(0), PAD) + tl.arange(0, PAD)
    tl.store(p_rows, b_lse)
    tl.store(p_rows + widen(tl.num_programs(0), PAD), b_delta)
