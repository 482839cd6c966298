"""Flash attention forward for Hopper, in Gluon: one producer warp, consumer warpgroups of 64 query rows, persistent.

out = softmax(scale q k^T) v, lse = log sum exp(scale q k^T), as in triton_attention_forward. The producer copies q, k
and v into shared memory with TMA; mbarriers say when a stage is full and when every consumer has left it. A consumer
starts the scores of its next keys before the product with v of the last ones, and takes their softmax while that runs.
D = D0 + DT columns, D0 a power of two that fills whole swizzled rows and DT = 0 or 8: 72 is 64 + 8. The tail lies in
the first half of a tile of 16 columns. Of its second half q's and k's are zero, and v's holds a column of ones, so that
the row sum, of the very probabilities that multiply v, comes out of that product.
The last keys come first: only that tile is masked. Coordinates of TMA are rows, its offsets are 64-bit.
Source: Shah et al. 2024, FlashAttention-3 (arXiv:2407.08608), without its FP8; exponentials partly as polynomials.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from longreel.kernels.triton_attention_hopper_consumer import consume
from longreel.kernels.triton_attention_hopper_tiles import tile_bounds


@gluon.jit
def produce(
    descriptors,
    buffers,
    barriers,
    sizes,
    D0: gl.constexpr,
    DT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    VARLEN: gl.constexpr,
):
    """One warp: fills q once per tile of queries, and the stages of k and v, from the last keys to the first."""
    q0, qt, k0, kt, v0, vt = descriptors
    q0_smem, qt_smem, k0_smem, kt_smem, v0_smem, vt_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    cu_q, cu_k, num_heads, q_len, k_len, num_tiles, total_tiles, num_segments, search_steps = sizes
    BYTES: gl.constexpr = BLOCK_N * (D0 + DT) * 2
    num_loads = gl.to_tensor(0)
    num_queries = gl.to_tensor(0)
    for i in range(gl.program_id(0), total_tiles, gl.num_programs(0)):
        i_pair = i // num_tiles
        i_b = i_pair // num_heads
        i_h = i_pair % num_heads
        row, q_end, k_start, k_end = tile_bounds(
            i % num_tiles, cu_q, cu_k, q_len, k_len, num_segments, search_steps, BLOCK_M, VARLEN
        )
        count = (k_end - k_start + BLOCK_N - 1) // BLOCK_N
        if (row < q_end) & (count > 0):
            mbarrier.wait(q_empty, (num_queries & 1) ^ 1)
            mbarrier.expect(q_full, CONSUMERS * 64 * (D0 + DT) * 2)
            for group in gl.static_range(CONSUMERS):
                q_row = row + group * 64
                tma.async_copy_global_to_shared(q0, [i_b, i_h, q_row, 0], q_full, q0_smem.index(group))
                if DT > 0:
                    qt_part = qt_smem.index(group).slice(0, 64, dim=0)
                    tma.async_copy_global_to_shared(qt, [i_b, i_h, q_row, D0], q_full, qt_part)
            num_queries += 1
            for j in range(count):
                stage = num_loads % STAGES
                phase = (num_loads // STAGES) & 1
                first = k_start + (count - 1 - j) * BLOCK_N
                mbarrier.wait(k_empty.index(stage), phase ^ 1)
                mbarrier.expect(k_full.index(stage), BYTES)
                tma.async_copy_global_to_shared(k0, [i_b, i_h, first, 0], k_full.index(stage), k0_smem.index(stage))
                if DT > 0:
                    kt_part = kt_smem.index(stage).slice(0, BLOCK_N, dim=0)
                    tma.async_copy_global_to_shared(kt, [i_b, i_h, first, D0], k_full.index(stage), kt_part)
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                mbarrier.expect(v_full.index(stage), BYTES)
                tma.async_copy_global_to_shared(v0, [i_b, i_h, first, 0], v_full.index(stage), v0_smem.index(stage))
                if DT > 0:
                    vt_part = vt_smem.index(stage).slice(0, BLOCK_N, dim=0)
                    tma.async_copy_global_to_shared(vt, [i_b, i_h, first, D0], v_full.index(stage), vt_part)
                num_loads += 1


@gluon.jit
def attention_fwd_hopper_kernel(
    q0,
    qt,
    k0,
    kt,
    v0,
    vt,
    out,
    lse,
    cu_q,
    cu_k,
    scale,
    s_ob,
    s_os,
    s_oh,
    num_heads,
    q_len,
    k_len,
    num_tiles,
    total_tiles,
    num_segments,
    search_steps,
    ALIGN: gl.constexpr,
    D0: gl.constexpr,
    DT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,
    POLY: gl.constexpr,
    VARLEN: gl.constexpr,
    NEGATE: gl.constexpr,
):
    """q0 .. vt are TMA descriptors [B, H, S, D] of boxes [1, 1, rows, D0] and [1, 1, rows, DT] (None for DT = 0).

    scale is |softmax_scale|, NEGATE its sign; out's strides in units of ALIGN.
    """
    BLOCK_M: gl.constexpr = CONSUMERS * 64
    DTYPE: gl.constexpr = q0.dtype
    ROW_BYTES: gl.constexpr = D0 * 2 if D0 < 64 else 128
    WIDE: gl.constexpr = gl.NVMMASharedLayout(ROW_BYTES, 16, rank=2)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(0, 16, rank=2)
    q0_smem = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 64, D0], WIDE)
    k0_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D0], WIDE)
    v0_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D0], WIDE)
    # What is not there has a stand-in that nothing reads: None cannot go into a partition.
    if not VARLEN:
        cu_q = lse
        cu_k = lse
    if DT == 0:
        qt = q0
        kt = k0
        vt = v0
        qt_smem = q0_smem
        kt_smem = k0_smem
        vt_smem = v0_smem
    else:
        qt_smem = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 128, 8], NARROW)
        kt_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 2 * BLOCK_N, 8], NARROW)
        vt_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 2 * BLOCK_N, 8], NARROW)
        # TMA writes the first half of a tail only: the other keeps what it gets here.
        FILL: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
        for group in gl.static_range(CONSUMERS):
            qt_smem.index(group).store(gl.zeros([128, 8], DTYPE, FILL))
        o_row = gl.expand_dims(gl.arange(0, 2 * BLOCK_N, gl.SliceLayout(1, FILL)), 1)
        o_col = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, FILL)), 0)
        ones = gl.where((o_row >= BLOCK_N) & (o_col == 0), 1.0, 0.0).to(DTYPE)
        for stage in gl.static_range(STAGES):
            kt_smem.index(stage).store(gl.zeros([2 * BLOCK_N, 8], DTYPE, FILL))
            vt_smem.index(stage).store(ones)
        fence_async_shared()
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=CONSUMERS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()

    descriptors = (q0, qt, k0, kt, v0, vt)
    buffers = (q0_smem, qt_smem, k0_smem, kt_smem, v0_smem, vt_smem)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sizes = (cu_q, cu_k, num_heads, q_len, k_len, num_tiles, total_tiles, num_segments, search_steps)
    target = (out, lse, s_ob, s_os, s_oh)
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (
                    consume,
                    (
                        0,
                        buffers,
                        barriers,
                        sizes,
                        target,
                        scale,
                        ALIGN,
                        D0,
                        DT,
                        BLOCK_M,
                        BLOCK_N,
                        STAGES,
                        POLY,
                        VARLEN,
                        NEGATE,
                    ),
                ),
                (
                    consume,
                    (
                        1,
                        buffers,
                        barriers,
                        sizes,
                        target,
                        scale,
                        ALIGN,
                        D0,
                        DT,
                        BLOCK_M,
                        BLOCK_N,
                        STAGES,
                        POLY,
                        VARLEN,
                        NEGATE,
                    ),
                ),
                (
                    consume,
                    (
                        2,
                        buffers,
                        barriers,
                        sizes,
                        target,
                        scale,
                        ALIGN,
                        D0,
                        DT,
                        BLOCK_M,
                        BLOCK_N,
                        STAGES,
                        POLY,
                        VARLEN,
                        NEGATE,
                    ),
                ),
                (produce, (descriptors, buffers, barriers, sizes, D0, DT, BLOCK_M, BLOCK_N, STAGES, CONSUMERS, VARLEN)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    consume,
                    (
                        0,
                        buffers,
                        barriers,
                        sizes,
                        target,
                        scale,
                        ALIGN,
                        D0,
                        DT,
                        BLOCK_M,
                        BLOCK_N,
                        STAGES,
                        POLY,
                        VARLEN,
                        NEGATE,
                    ),
                ),
                (
                    consume,
                    (
                        1,
                        buffers,
                        barriers,
                        sizes,
                        target,
                        scale,
                        ALIGN,
                        D0,
                        DT,
                        BLOCK_M,
                        BLOCK_N,
                        STAGES,
                        POLY,
                        VARLEN,
                        NEGATE,
                    ),
                ),
                (produce, (descriptors, buffers, barriers, sizes, D0, DT, BLOCK_M, BLOCK_N, STAGES, CONSUMERS, VARLEN)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
