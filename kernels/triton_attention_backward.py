"""Flash attention backward: delta first, then one kernel for dk and dv and one for dq, or the first for all three.

P = exp(scale q k^T - lse), dv = P^T dout, dS = P * (dout v^T - delta), dq = scale dS k, dk = scale dS^T q, with
delta = rowsum(dout * out) - dlse. Two kernels recompute P twice: 7 matrix products, no atomics, deterministic. One
kernel needs 5, and adds dq to fp32 memory atomically: the order of additions, and so the last bits, differ every time.
Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691), algorithm 2, its loop split in two.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from longreel.kernels.triton_attention_tiles import add_tile, load_tile, program_tile, tile_bounds, widen

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_dkdv_kernel(
    q,
    k,
    v,
    dout,
    rows,
    dk,
    dv,
    dq,
    cu_q,
    cu_k,
    scale,
    s_qb,
    s_qs: tl.constexpr,
    s_qh,
    s_kb,
    s_ks: tl.constexpr,
    s_kh,
    s_vb,
    s_vs: tl.constexpr,
    s_vh,
    s_gb,
    s_gs: tl.constexpr,
    s_gh,
    s_dkb,
    s_dks: tl.constexpr,
    s_dkh,
    s_dvb,
    s_dvs: tl.constexpr,
    s_dvh,
    num_heads,
    q_len,
    k_len,
    num_tiles,
    num_row_tiles,
    num_pairs,
    num_segments,
    search_steps,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    VARLEN: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """One tile of BLOCK_N keys; query rows pass by in tiles of BLOCK_M. Scores are held transposed, [N, M].

    ATOMIC: dq [B, H, S, D], fp32 and zero at the start, gets dS k added, without the scale, in no fixed order.
    """
    i_tile, i_b, i_h = program_tile(num_tiles, num_heads)
    row, k_end, q_start, q_end, segment = tile_bounds(
        i_tile, cu_k, cu_q, k_len, q_len, num_segments, search_steps, BLOCK_N, VARLEN
    )
    if row >= k_end:
        return
    MASK_D0: tl.constexpr = D0 > HEAD_DIM
    MASK_D1: tl.constexpr = D0 + D1 > HEAD_DIM
    # As in the forward kernel: fp32 takes the difference of score and lse before it changes the base. Half precision
    # finds the lse in base 2 already.
    FULL: tl.constexpr = q.dtype.element_ty == tl.float32
    scale_log2 = scale * LOG2_E
    s_qs, s_gs = widen(s_qs, ALIGN), widen(s_gs, ALIGN)
    left = tl.minimum(k_end - row, BLOCK_N).to(tl.int32)
    o_row = tl.arange(0, BLOCK_N)
    o_n = o_row.to(tl.int64)
    m_n = o_row < left
    o_m = tl.arange(0, BLOCK_M).to(tl.int64)
    o_d0 = tl.arange(0, D0)
    m_d0 = o_d0 < HEAD_DIM
    s_ks, s_vs = widen(s_ks, ALIGN), widen(s_vs, ALIGN)
    p_k = k + i_b * widen(s_kb, ALIGN) + i_h * widen(s_kh, ALIGN) + row * s_ks + o_n[:, None] * s_ks
    p_v = v + i_b * widen(s_vb, ALIGN) + i_h * widen(s_vh, ALIGN) + row * s_vs + o_n[:, None] * s_vs
    p_q = q + i_b * widen(s_qb, ALIGN) + i_h * widen(s_qh, ALIGN) + q_start * s_qs
    p_g = dout + i_b * widen(s_gb, ALIGN) + i_h * widen(s_gh, ALIGN) + q_start * s_gs
    p_lse = rows + widen((i_b * num_heads + i_h) * num_row_tiles + q_start // PAD + segment, PAD)
    p_delta = p_lse + widen(num_pairs, 1) * num_row_tiles * PAD
    b_k0 = load_tile(p_k + o_d0[None, :], m_n, m_d0, True, MASK_D0)
    b_v0 = load_tile(p_v + o_d0[None, :], m_n, m_d0, True, MASK_D0)
    o_q0 = o_m[:, None] * s_qs + o_d0[None, :]
    o_g0 = o_m[:, None] * s_gs + o_d0[None, :]
    b_dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    b_dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    if D1 > 0:
        o_d1 = D0 + tl.arange(0, D1)
        m_d1 = o_d1 < HEAD_DIM
        b_k1 = load_tile(p_k + o_d1[None, :], m_n, m_d1, True, MASK_D1)
        b_v1 = load_tile(p_v + o_d1[None, :], m_n, m_d1, True, MASK_D1)
        o_q1 = o_m[:, None] * s_qs + o_d1[None, :]
        o_g1 = o_m[:, None] * s_gs + o_d1[None, :]
        b_dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        b_dv1 = tl.zeros([BLOCK_N, D1], tl.float32)

    # Its last tile holds more than registers do unless it is copied as the others are.
    LAST_STAGES: tl.constexpr = STAGES if ATOMIC else 1
    if ATOMIC:
        p_dq = dq + widen((i_b * num_heads + i_h) * q_len + q_start, HEAD_DIM)
        o_dq = o_m[:, None] * HEAD_DIM
    q_rows = q_end - q_start
    num_full = (q_rows // BLOCK_M).to(tl.int32)
    num_part = ((q_rows + BLOCK_M - 1) // BLOCK_M).to(tl.int32) - num_full
    for MASKED in tl.static_range(2):
        for i_m in tl.range(
            num_full * MASKED, num_full + num_part * MASKED, num_stages=STAGES + (LAST_STAGES - STAGES) * MASKED
        ):
            first = widen(i_m, BLOCK_M)
            m_m = o_m < q_rows - first
            b_q0 = load_tile(p_q + first * s_qs + o_q0, m_m, m_d0, MASKED, MASK_D0)
            b_s = tl.dot(b_k0, tl.trans(b_q0), input_precision="ieee")
            if D1 > 0:
                b_q1 = load_tile(p_q + first * s_qs + o_q1, m_m, m_d1, MASKED, MASK_D1)
                b_s = tl.dot(b_k1, tl.trans(b_q1), b_s, input_precision="ieee")
            # +inf in rows that are not there makes P zero; scores need no mask.
            b_lse = tl.load(p_lse + first + o_m)
            if FULL:
                b_p = tl.exp2((b_s * scale - b_lse[None, :]) * LOG2_E)
            else:
                b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
            if ATOMIC:
                # Keys that are not there have P = exp(-lse), inf where lse is very negative; times their zeros NaN.
                ragged = left < BLOCK_N
                if ragged:
                    b_p = tl.where(m_n[:, None], b_p, 0.0)
            b_g0 = load_tile(p_g + first * s_gs + o_g0, m_m, m_d0, MASKED, MASK_D0)
            b_dp = tl.dot(b_v0, tl.trans(b_g0), input_precision="ieee")
            b_p16 = b_p.to(q.dtype.element_ty)
            b_dv0 = tl.dot(b_p16, b_g0, b_dv0, input_precision="ieee")
            if D1 > 0:
                b_g1 = load_tile(p_g + first * s_gs + o_g1, m_m, m_d1, MASKED, MASK_D1)
                b_dp = tl.dot(b_v1, tl.trans(b_g1), b_dp, input_precision="ieee")
                b_dv1 = tl.dot(b_p16, b_g1, b_dv1, input_precision="ieee")
            b_delta = tl.load(p_delta + first + o_m)
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(q.dtype.element_ty)
            b_dk0 = tl.dot(b_ds, b_q0, b_dk0, input_precision="ieee")
            if D1 > 0:
                b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision="ieee")
            if ATOMIC:
                p_dq_rows = p_dq + first * HEAD_DIM + o_dq
                b_dq0 = tl.dot(tl.trans(b_ds), b_k0, input_precision="ieee")
                add_tile(p_dq_rows + o_d0[None, :], b_dq0, m_m, m_d0, MASKED, MASK_D0)
                if D1 > 0:
                    b_dq1 = tl.dot(tl.trans(b_ds), b_k1, input_precision="ieee")
                    add_tile(p_dq_rows + o_d1[None, :], b_dq1, m_m, m_d1, MASKED, MASK_D1)

    s_dks, s_dvs = widen(s_dks, ALIGN), widen(s_dvs, ALIGN)
    p_dk = dk + i_b * widen(s_dkb, ALIGN) + i_h * widen(s_dkh, ALIGN) + row * s_dks + o_n[:, None] * s_dks
    p_dv = dv + i_b * widen(s_dvb, ALIGN) + i_h * widen(s_dvh, ALIGN) + row * s_dvs + o_n[:, None] * s_dvs
    m_0 = m_n[:, None] & m_d0[None, :]
    tl.store(p_dk + o_d0[None, :], (b_dk0 * scale).to(dk.dtype.element_ty), mask=m_0)
    tl.store(p_dv + o_d0[None, :], b_dv0.to(dv.dtype.element_ty), mask=m_0)
    if D1 > 0:
        m_1 = m_n[:, None] & m_d1[None, :]
        tl.store(p_dk + o_d1[None, :], (b_dk1 * scale).to(dk.dtype.element_ty), mask=m_1)
        tl.store(p_dv + o_d1[None, :], b_dv1.to(dv.dtype.element_ty), mask=m_1)


@triton.jit
def attention_dq_kernel(
    q,
    k,
    v,
    dout,
    rows,
    dq,
    cu_q,
    cu_k,
    scale,
    s_qb,
    s_qs: tl.constexpr,
    s_qh,
    s_kb,
    s_ks: tl.constexpr,
    s_kh,
    s_vb,
    s_vs: tl.constexpr,
    s_vh,
    s_gb,
    s_gs: tl.constexpr,
    s_gh,
    s_dqb,
    s_dqs: tl.constexpr,
    s_dqh,
    num_heads,
    q_len,
    k_len,
    num_tiles,
    num_row_tiles,
    num_pairs,
    num_segments,
    search_steps,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """One tile of BLOCK_M query rows; keys and values pass by in tiles of BLOCK_N."""
    i_tile, i_b, i_h = program_tile(num_tiles, num_heads)
    row, q_end, k_start, k_end, segment = tile_bounds(
        i_tile, cu_q, cu_k, q_len, k_len, num_segments, search_steps, BLOCK_M, VARLEN
    )
    if row >= q_end:
        return
    MASK_D0: tl.constexpr = D0 > HEAD_DIM
    MASK_D1: tl.constexpr = D0 + D1 > HEAD_DIM
    # As in the forward kernel: fp32 takes the difference of score and lse before it changes the base. Half precision
    # finds the lse in base 2 already.
    FULL: tl.constexpr = q.dtype.element_ty == tl.float32
    scale_log2 = scale * LOG2_E
    s_ks, s_vs = widen(s_ks, ALIGN), widen(s_vs, ALIGN)
    o_m = row + tl.arange(0, BLOCK_M)
    m_m = o_m < q_end
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    o_d0 = tl.arange(0, D0)
    m_d0 = o_d0 < HEAD_DIM
    p_q = q + i_b * widen(s_qb, ALIGN) + i_h * widen(s_qh, ALIGN) + o_m[:, None] * widen(s_qs, ALIGN)
    p_g = dout + i_b * widen(s_gb, ALIGN) + i_h * widen(s_gh, ALIGN) + o_m[:, None] * widen(s_gs, ALIGN)
    p_k = k + i_b * widen(s_kb, ALIGN) + i_h * widen(s_kh, ALIGN) + k_start * s_ks
    p_v = v + i_b * widen(s_vb, ALIGN) + i_h * widen(s_vh, ALIGN) + k_start * s_vs
    # A tile's first row within its segment; rows past the end of the last tile are not read.
    q_start = tl.load(cu_q + segment).to(tl.int64) if VARLEN else segment
    p_lse = rows + widen((i_b * num_heads + i_h) * num_row_tiles + q_start // PAD + segment, PAD) + row - q_start
    p_delta = p_lse + widen(num_pairs, 1) * num_row_tiles * PAD
    o_row = tl.arange(0, BLOCK_M)
    b_q0 = load_tile(p_q + o_d0[None, :], m_m, m_d0, True, MASK_D0)
    b_g0 = load_tile(p_g + o_d0[None, :], m_m, m_d0, True, MASK_D0)
    b_lse = tl.load(p_lse + o_row, mask=m_m, other=0.0)
    b_delta = tl.load(p_delta + o_row, mask=m_m, other=0.0)
    o_k0 = o_n[:, None] * s_ks + o_d0[None, :]
    o_v0 = o_n[:, None] * s_vs + o_d0[None, :]
    b_dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        o_d1 = D0 + tl.arange(0, D1)
        m_d1 = o_d1 < HEAD_DIM
        b_q1 = load_tile(p_q + o_d1[None, :], m_m, m_d1, True, MASK_D1)
        b_g1 = load_tile(p_g + o_d1[None, :], m_m, m_d1, True, MASK_D1)
        o_k1 = o_n[:, None] * s_ks + o_d1[None, :]
        o_v1 = o_n[:, None] * s_vs + o_d1[None, :]
        b_dq1 = tl.zeros([BLOCK_M, D1], tl.float32)

    k_rows = k_end - k_start
    num_full = (k_rows // BLOCK_N).to(tl.int32)
    num_part = ((k_rows + BLOCK_N - 1) // BLOCK_N).to(tl.int32) - num_full
    for MASKED in tl.static_range(2):
        for i_n in tl.range(num_full * MASKED, num_full + num_part * MASKED, num_stages=STAGES - (STAGES - 1) * MASKED):
            first = widen(i_n, BLOCK_N)
            m_n = o_n < k_rows - first
            b_k0 = load_tile(p_k + first * s_ks + o_k0, m_n, m_d0, MASKED, MASK_D0)
            b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision="ieee")
            b_v0 = load_tile(p_v + first * s_vs + o_v0, m_n, m_d0, MASKED, MASK_D0)
            b_dp = tl.dot(b_g0, tl.trans(b_v0), input_precision="ieee")
            if D1 > 0:
                b_k1 = load_tile(p_k + first * s_ks + o_k1, m_n, m_d1, MASKED, MASK_D1)
                b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision="ieee")
                b_v1 = load_tile(p_v + first * s_vs + o_v1, m_n, m_d1, MASKED, MASK_D1)
                b_dp = tl.dot(b_g1, tl.trans(b_v1), b_dp, input_precision="ieee")
            if FULL:
                b_p = tl.exp2((b_s * scale - b_lse[:, None]) * LOG2_E)
            else:
                b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
            if MASKED:
                # exp2 of minus a very negative lse is inf, and inf times a key of zeros is NaN.
                b_p = tl.where(m_n[None, :], b_p, 0.0)
            b_ds = (b_p * (b_dp - b_delta[:, None])).to(q.dtype.element_ty)
            b_dq0 = tl.dot(b_ds, b_k0, b_dq0, input_precision="ieee")
            if D1 > 0:
                b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision="ieee")

    p_dq = dq + i_b * widen(s_dqb, ALIGN) + i_h * widen(s_dqh, ALIGN) + o_m[:, None] * widen(s_dqs, ALIGN)
    tl.store(p_dq + o_d0[None, :], (b_dq0 * scale).to(dq.dtype.element_ty), mask=m_m[:, None] & m_d0[None, :])
    if D1 > 0:
        tl.store(p_dq + o_d1[None, :], (b_dq1 * scale).to(dq.dtype.element_ty), mask=m_m[:, None] & m_d1[None, :])
