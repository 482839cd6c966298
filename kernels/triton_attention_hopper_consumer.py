"""The consumers of the Hopper forward kernel: scores, softmax and the product with v of 64 query rows.

See triton_attention_hopper_kernel for the whole.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longreel.kernels.triton_attention_exp import exp2_mixed
from longreel.kernels.triton_attention_hopper_tiles import core_matrices, tile_bounds

LN_2 = gl.constexpr(0.6931471805599453)
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def start_scores(q0, qt, k0, kt, BLOCK_N: gl.constexpr, DT: gl.constexpr, LAYOUT: gl.constexpr):
    """Begin q k^T, [64, BLOCK_N]: one or two groups in flight."""
    b_s = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    b_s = warpgroup_mma(q0, k0.permute((1, 0)), b_s, use_acc=False, is_async=True)
    if DT > 0:
        b_s = warpgroup_mma(
            qt._reinterpret(qt.dtype, [64, 16], core_matrices(64)),
            kt._reinterpret(kt.dtype, [16, BLOCK_N], core_matrices(BLOCK_N, True)),
            b_s,
            is_async=True,
        )
    return b_s


@gluon.jit
def tail_of_v(vt, BLOCK_N: gl.constexpr):
    """[BLOCK_N, 16]: the last columns of v, then a column of ones and zeros."""
    return vt._reinterpret(vt.dtype, [BLOCK_N, 16], core_matrices(BLOCK_N))


@gluon.jit
def clear_rows(tile, valid, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Zero the rows of a tile of v from `valid` on: a probability of 0 times what is infinite or NaN would be NaN.

    Every consumer does so to the tile that they share; they write the same values.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    o_n = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    there = gl.expand_dims(o_n < valid, 1)
    tile.store(gl.where(there, tile.load(LAYOUT), gl.zeros([ROWS, COLUMNS], tile.dtype, LAYOUT)))


@gluon.jit
def clear_behind(v0, vt, full, phase, valid, BLOCK_N: gl.constexpr, D0: gl.constexpr, DT: gl.constexpr):
    """Clear the tile of v behind a sequence's last key: there lies the next one. TMA reads zeros at the end."""
    if valid < BLOCK_N:
        mbarrier.wait(full, phase)
        clear_rows(v0, valid, BLOCK_N, D0)
        if DT > 0:
            clear_rows(vt.slice(0, BLOCK_N, dim=0), valid, BLOCK_N, DT)
        # Before wgmma reads what threads have written.
        fence_async_shared()


@gluon.jit
def soften(
    b_s,
    b_max,
    valid,
    scale_log2,
    MASKED: gl.constexpr,
    NEGATE: gl.constexpr,
    POLY: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Probabilities of one tile of scores in fp32, the new maximum, and the decay of what came before.

    The maximum is of scores times scale_log2 > 0; valid is the number of keys that are there.
    """
    if NEGATE:
        b_s = -b_s
    if MASKED:
        o_n = gl.arange(0, b_s.shape[1], gl.SliceLayout(0, LAYOUT))
        there = gl.expand_dims(o_n < valid, 0)
        b_s = gl.where(there, b_s, float("-inf"))
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale_log2)
    # A row whose scores are all -inf keeps its sum at 0 instead of -inf - -inf.
    b_shift = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_decay = gl.exp2(b_max - b_shift)
    b_p = exp2_mixed(b_s * scale_log2 - gl.expand_dims(b_shift, 1), POLY)
    if MASKED:
        # -inf times a scale of zero is no -inf.
        b_p = gl.where(there, b_p, 0.0)
    return b_p, b_new, b_decay


@gluon.jit
def round_pairs(b_p, DTYPE: gl.constexpr):
    """As round_probabilities in triton_attention_forward."""
    if gl.bfloat16 == DTYPE:
        b_r, b_rounded = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
            "=&r,=&r,=&r,f,f",
            [b_p],
            dtype=(gl.bfloat16, gl.float32),
            is_pure=True,
            pack=2,
        )
    else:
        b_r = b_p.to(DTYPE)
        b_rounded = b_r.to(gl.float32)
    return b_r, b_rounded


@gluon.jit
def round_off(b_p, b_sum, b_decay, SUM: gl.constexpr, DTYPE: gl.constexpr):
    """Probabilities in DTYPE, and the sum of the rounded ones where no column of ones gives it."""
    if SUM:
        b_r, b_rounded = round_pairs(b_p, DTYPE)
        b_sum = b_sum * b_decay + gl.sum(b_rounded, 1)
    else:
        b_r = b_p.to(DTYPE)
    return b_r, b_sum


@gluon.jit
def consume(
    group,
    buffers,
    barriers,
    sizes,
    target,
    scale,
    ALIGN: gl.constexpr,
    D0: gl.constexpr,
    DT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    POLY: gl.constexpr,
    VARLEN: gl.constexpr,
    NEGATE: gl.constexpr,
):
    """One warpgroup: rows group * 64 to group * 64 + 63 of every tile of queries that the program owns."""
    q0_smem, qt_smem, k0_smem, kt_smem, v0_smem, vt_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    cu_q, cu_k, num_heads, q_len, k_len, num_tiles, total_tiles, num_segments, search_steps = sizes
    DTYPE: gl.constexpr = k0_smem.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    T_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    PT_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, T_LAYOUT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    T_ROWS: gl.constexpr = gl.SliceLayout(1, T_LAYOUT)
    # Products with v that are in flight when the scores before them are waited for.
    LATER: gl.constexpr = 2 if DT > 0 else 1
    scale_log2 = scale * LOG2_E
    q0 = q0_smem.index(group)
    qt = qt_smem.index(group)
    num_loads = gl.to_tensor(0)
    num_queries = gl.to_tensor(0)
    for i in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        i_pair = i // num_tiles
        row, q_end, k_start, k_end = tile_bounds(
            i % num_tiles, cu_q, cu_k, q_len, k_len, num_segments, search_steps, BLOCK_M, VARLEN
        )
        count = (k_end - k_start + BLOCK_N - 1) // BLOCK_N
        if row < q_end:
            b_o = gl.zeros([64, D0], gl.float32, O_LAYOUT)
            b_t = gl.zeros([64, 16], gl.float32, T_LAYOUT)
            b_max = gl.full([64], float("-inf"), gl.float32, ROWS)
            b_sum = gl.zeros([64], gl.float32, ROWS)
            if count > 0:
                mbarrier.wait(q_full, num_queries & 1)
                stage = num_loads % STAGES
                phase = (num_loads // STAGES) & 1
                mbarrier.wait(k_full.index(stage), phase)
                b_s = start_scores(q0, qt, k0_smem.index(stage), kt_smem.index(stage), BLOCK_N, DT, S_LAYOUT)
                b_s = warpgroup_mma_wait(0, deps=[b_s])
                mbarrier.arrive(k_empty.index(stage), count=1)
                valid = k_end - k_start - (count - 1) * BLOCK_N
                b_p, b_max, b_decay = soften(b_s, b_max, valid, scale_log2, True, NEGATE, 0, S_LAYOUT)
                b_r, b_sum = round_off(b_p, b_sum, b_decay, DT == 0, DTYPE)
                if VARLEN:
                    clear_behind(
                        v0_smem.index(stage), vt_smem.index(stage), v_full.index(stage), phase, valid, BLOCK_N, D0, DT
                    )
                v_stage = stage
                v_phase = phase
                num_loads += 1
                stage = num_loads % STAGES
                phase = (num_loads // STAGES) & 1
                mbarrier.wait(k_full.index(stage), phase, pred=count > 1)
                for j in range(count - 1):
                    b_s = start_scores(q0, qt, k0_smem.index(stage), kt_smem.index(stage), BLOCK_N, DT, S_LAYOUT)
                    mbarrier.wait(v_full.index(v_stage), v_phase)
                    b_o = warpgroup_mma(gl.convert_layout(b_r, P_LAYOUT), v0_smem.index(v_stage), b_o, is_async=True)
                    if DT > 0:
                        b_t = warpgroup_mma(
                            gl.convert_layout(b_r, PT_LAYOUT),
                            tail_of_v(vt_smem.index(v_stage), BLOCK_N),
                            b_t,
                            is_async=True,
                        )
                    b_s = warpgroup_mma_wait(LATER, deps=[b_s])
                    mbarrier.arrive(k_empty.index(stage), count=1)
                    b_p, b_max, b_decay = soften(b_s, b_max, BLOCK_N, scale_log2, False, NEGATE, POLY, S_LAYOUT)
                    last_v = v_stage
                    v_stage = stage
                    v_phase = phase
                    num_loads += 1
                    stage = num_loads % STAGES
                    phase = (num_loads // STAGES) & 1
                    # Not at the top: the loop of this wait keeps ptxas from moving the next one before the softmax.
                    mbarrier.wait(k_full.index(stage), phase, pred=j < count - 2)
                    # Rounded after it: ptxas runs wgmma one by one if registers that they read change meanwhile.
                    if DT > 0:
                        b_o, b_t, b_p = warpgroup_mma_wait(0, deps=[b_o, b_t, b_p])
                    else:
                        b_o, b_p = warpgroup_mma_wait(0, deps=[b_o, b_p])
                    mbarrier.arrive(v_empty.index(last_v), count=1)
                    b_r, b_sum = round_off(b_p, b_sum, b_decay, DT == 0, DTYPE)
                    b_o = b_o * gl.expand_dims(gl.convert_layout(b_decay, O_ROWS), 1)
                    if DT > 0:
                        b_t = b_t * gl.expand_dims(gl.convert_layout(b_decay, T_ROWS), 1)
                mbarrier.arrive(q_empty, count=1)
                mbarrier.wait(v_full.index(v_stage), v_phase)
                b_o = warpgroup_mma(gl.convert_layout(b_r, P_LAYOUT), v0_smem.index(v_stage), b_o, is_async=True)
                if DT > 0:
                    b_t = warpgroup_mma(
                        gl.convert_layout(b_r, PT_LAYOUT),
                        tail_of_v(vt_smem.index(v_stage), BLOCK_N),
                        b_t,
                        is_async=True,
                    )
                    b_o, b_t = warpgroup_mma_wait(0, deps=[b_o, b_t])
                else:
                    b_o = warpgroup_mma_wait(0, deps=[b_o])
                mbarrier.arrive(v_empty.index(v_stage), count=1)
                num_queries += 1
            store_rows(
                b_o, b_t, b_max, b_sum, target, i_pair, row + group * 64, q_end, num_heads, q_len,
                ALIGN, D0, DT, O_LAYOUT, T_LAYOUT, S_LAYOUT,
            )  # fmt: skip


@gluon.jit
def store_rows(
    b_o,
    b_t,
    b_max,
    b_sum,
    target,
    i_pair,
    row,
    q_end,
    num_heads,
    q_len,
    ALIGN: gl.constexpr,
    D0: gl.constexpr,
    DT: gl.constexpr,
    O_LAYOUT: gl.constexpr,
    T_LAYOUT: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):
    """Divide by the row sum, and write out and lse. A sum of zero is a row without keys: out 0 and lse -inf."""
    out, lse, s_ob, s_os, s_oh = target
    o_t = gl.arange(0, 16, gl.SliceLayout(0, T_LAYOUT))
    if DT > 0:
        # Column DT of the tail is the sum.
        ones = gl.sum(gl.where(gl.expand_dims(o_t == DT, 0), b_t, 0.0), 1)
        b_sum = gl.convert_layout(ones, gl.SliceLayout(1, S_LAYOUT))
    empty = b_sum == 0.0
    b_safe = gl.where(empty, 1.0, b_sum)
    b_lse = gl.where(empty, float("-inf"), (b_max + gl.log2(b_safe)) * LN_2)
    b_norm = 1.0 / b_safe
    i_b = (i_pair // num_heads).to(gl.int64)
    i_h = (i_pair % num_heads).to(gl.int64)
    align = gl.full((), ALIGN, gl.int64)
    first = row.to(gl.int64)
    o_m = first + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT)).to(gl.int64)
    gl.store(lse + i_pair.to(gl.int64) * q_len + o_m, b_lse, mask=o_m < q_end)
    p_o = out + i_b * (align * s_ob) + i_h * (align * s_oh)
    o_m = first + gl.arange(0, 64, gl.SliceLayout(1, O_LAYOUT)).to(gl.int64)
    o_d = gl.arange(0, D0, gl.SliceLayout(0, O_LAYOUT))
    b_o = b_o * gl.expand_dims(gl.convert_layout(b_norm, gl.SliceLayout(1, O_LAYOUT)), 1)
    p_rows = gl.expand_dims(p_o + o_m * (align * s_os), 1)
    gl.store(p_rows + gl.expand_dims(o_d, 0), b_o.to(out.dtype.element_ty), mask=gl.expand_dims(o_m < q_end, 1))
    if DT > 0:
        o_m = first + gl.arange(0, 64, gl.SliceLayout(1, T_LAYOUT)).to(gl.int64)
        b_t = b_t * gl.expand_dims(gl.convert_layout(b_norm, gl.SliceLayout(1, T_LAYOUT)), 1)
        there = gl.expand_dims(o_m < q_end, 1) & gl.expand_dims(o_t < DT, 0)
        p_rows = gl.expand_dims(p_o + o_m * (align * s_os), 1)
        gl.store(p_rows + D0 + gl.expand_dims(o_t, 0), b_t.to(out.dtype.element_ty), mask=there)
