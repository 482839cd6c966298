"""Flash attention forward: one program per tile of query rows, keys and values streamed past it.

out = softmax(scale q k^T) v, lse = log sum exp(scale q k^T), in base 2 with an online maximum. The row sum adds the
rounded probabilities, the ones that multiply v, so that the weights of a row sum to one.
Traffic per program: q once, k and v once each, out and lse once.
Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691), algorithm 1.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from longreel.kernels.triton_attention_tiles import load_tile, program_tile, tile_bounds, widen

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def round_probabilities(b_p, dtype: tl.constexpr):
    """A tile of fp32 values in dtype, and these values in fp32 again.

    For bf16 as PTX: the compiler would convert one by one, in twice the instructions and on the units that
    exponentials need. The interpreter has no PTX, and no bf16 either.
    """
    if dtype == tl.bfloat16:
        b_p, b_rounded = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
            "=&r,=&r,=&r,f,f",
            [b_p],
            dtype=(tl.bfloat16, tl.float32),
            is_pure=True,
            pack=2,
        )
    else:
        b_p = b_p.to(dtype)
        b_rounded = b_p.to(tl.float32)
    return b_p, b_rounded


@triton.jit
def attention_fwd_kernel(
    q,
    k,
    v,
    out,
    lse,
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
    s_ob,
    s_os: tl.constexpr,
    s_oh,
    num_heads,
    q_len,
    k_len,
    num_tiles,
    num_segments,
    search_steps,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    VARLEN: tl.constexpr,
    NEGATE: tl.constexpr,
):
    """scale is |softmax_scale|, NEGATE its sign; strides in units of ALIGN."""
    i_tile, i_b, i_h = program_tile(num_tiles, num_heads)
    row, q_end, k_start, k_end, _ = tile_bounds(
        i_tile, cu_q, cu_k, q_len, k_len, num_segments, search_steps, BLOCK_M, VARLEN
    )
    if row >= q_end:
        return
    # Half precision folds the scale into one multiply-add per score. In fp32 that rounding, relative to the score
    # and not to its distance from the maximum, would be the largest error.
    FULL: tl.constexpr = q.dtype.element_ty == tl.float32
    scale_log2 = scale * LOG2_E
    MASK_D0: tl.constexpr = D0 > HEAD_DIM
    MASK_D1: tl.constexpr = D0 + D1 > HEAD_DIM
    s_ks, s_vs = widen(s_ks, ALIGN), widen(s_vs, ALIGN)
    o_m = row + tl.arange(0, BLOCK_M)
    m_m = o_m < q_end
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    o_d0 = tl.arange(0, D0)
    m_d0 = o_d0 < HEAD_DIM
    p_q = q + i_b * widen(s_qb, ALIGN) + i_h * widen(s_qh, ALIGN) + o_m[:, None] * widen(s_qs, ALIGN)
    p_k = k + i_b * widen(s_kb, ALIGN) + i_h * widen(s_kh, ALIGN) + k_start * s_ks
    p_v = v + i_b * widen(s_vb, ALIGN) + i_h * widen(s_vh, ALIGN) + k_start * s_vs
    b_q0 = load_tile(p_q + o_d0[None, :], m_m, m_d0, True, MASK_D0)
    o_k0 = o_n[:, None] * s_ks + o_d0[None, :]
    o_v0 = o_n[:, None] * s_vs + o_d0[None, :]
    b_acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        o_d1 = D0 + tl.arange(0, D1)
        m_d1 = o_d1 < HEAD_DIM
        b_q1 = load_tile(p_q + o_d1[None, :], m_m, m_d1, True, MASK_D1)
        o_k1 = o_n[:, None] * s_ks + o_d1[None, :]
        o_v1 = o_n[:, None] * s_vs + o_d1[None, :]
        b_acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)

    k_rows = k_end - k_start
    num_full = (k_rows // BLOCK_N).to(tl.int32)
    num_part = ((k_rows + BLOCK_N - 1) // BLOCK_N).to(tl.int32) - num_full
    # Full tiles without masks first, then the ragged one, if any, with them.
    for MASKED in tl.static_range(2):
        for i_n in tl.range(num_full * MASKED, num_full + num_part * MASKED, num_stages=STAGES - (STAGES - 1) * MASKED):
            first = widen(i_n, BLOCK_N)
            m_n = o_n < k_rows - first
            b_k0 = load_tile(p_k + first * s_ks + o_k0, m_n, m_d0, MASKED, MASK_D0)
            b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision="ieee")
            if D1 > 0:
                b_k1 = load_tile(p_k + first * s_ks + o_k1, m_n, m_d1, MASKED, MASK_D1)
                b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision="ieee")
            if NEGATE:
                b_s = -b_s
            if MASKED:
                b_s = tl.where(m_n[None, :], b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            # A row whose scores are all -inf keeps its sum at 0 instead of -inf - -inf.
            b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
            if FULL:
                b_p = tl.exp2((b_s - b_shift[:, None]) * scale_log2)
            else:
                b_p = tl.exp2(b_s * scale_log2 - (b_shift * scale_log2)[:, None])
            if MASKED:
                # -inf times a scale of zero is no -inf.
                b_p = tl.where(m_n[None, :], b_p, 0.0)
            b_decay = tl.where(b_max == float("-inf"), 0.0, tl.exp2((b_max - b_shift) * scale_log2))
            b_p, b_rounded = round_probabilities(b_p, q.dtype.element_ty)
            b_sum = b_sum * b_decay + tl.sum(b_rounded, 1)
            b_v0 = load_tile(p_v + first * s_vs + o_v0, m_n, m_d0, MASKED, MASK_D0)
            b_acc0 = tl.dot(b_p, b_v0, b_acc0 * b_decay[:, None], input_precision="ieee")
            if D1 > 0:
                b_v1 = load_tile(p_v + first * s_vs + o_v1, m_n, m_d1, MASKED, MASK_D1)
                b_acc1 = tl.dot(b_p, b_v1, b_acc1 * b_decay[:, None], input_precision="ieee")
            b_max = b_new

    # A sum of zero is a row without keys: out 0 and lse -inf. NaN passes through both.
    empty = b_sum == 0.0
    b_norm = 1.0 / tl.where(empty, 1.0, b_sum)
    b_lse = b_max * scale + tl.log2(tl.where(empty, 1.0, b_sum)) * LN_2
    b_lse = tl.where(empty, float("-inf"), b_lse)
    tl.store(lse + (i_b * num_heads + i_h) * q_len + o_m, b_lse, mask=m_m)
    p_o = out + i_b * widen(s_ob, ALIGN) + i_h * widen(s_oh, ALIGN) + o_m[:, None] * widen(s_os, ALIGN)
    b_o0 = (b_acc0 * b_norm[:, None]).to(out.dtype.element_ty)
    tl.store(p_o + o_d0[None, :], b_o0, mask=m_m[:, None] & m_d0[None, :])
    if D1 > 0:
        b_o1 = (b_acc1 * b_norm[:, None]).to(out.dtype.element_ty)
        tl.store(p_o + o_d1[None, :], b_o1, mask=m_m[:, None] & m_d1[None, :])
