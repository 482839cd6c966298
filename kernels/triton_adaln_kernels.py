"""The two Triton kernels of adaLN modulate, alone and after a gated residual; launched by triton_adaln.

    z = x + gate * y                       (only in the fused form; z is rounded, and what follows sees it rounded)
    out = (z - mean) * rstd * (1 + scale) + shift

A program takes its rows one by one, each as two powers of two in registers (1152 = 1024 + 128), and keeps the
segment's modulation, and its sums for dshift, dscale and dgate (triton_rows), beside them: one-dimensional blocks, so
that no tile changes its layout between load, reduction and store. Statistics are fp32, mean first and then the centred
squares.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from longreel.kernels.triton_rows import load_vector, segment_of_row, segment_start, store_vector


@triton.jit
def adaln_fwd_kernel(
    x,
    y,
    gate,
    shift,
    scale,
    z,
    out,
    mean,
    rstd,
    cu_seqlens,
    num_rows,
    seq_len,
    num_segments,
    stride_gate,
    stride_shift,
    stride_scale,
    eps,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Fused with the gated residual where y is given; otherwise y, gate and z are None and x is normalised."""
    i_p = tl.program_id(0).to(tl.int64)
    row = i_p * CHUNK
    last = tl.minimum(row + CHUNK, num_rows)
    i_n = segment_of_row(cu_seqlens, row, seq_len, num_segments)
    o_m = tl.arange(0, MAIN)
    o_t = MAIN + tl.arange(0, TAIL)
    while row < last:
        end = tl.minimum(last, segment_start(cu_seqlens, i_n + 1, seq_len))
        b_scale_m = 1 + load_vector(scale + i_n * stride_scale, o_m, C)
        b_scale_t = 1 + load_vector(scale + i_n * stride_scale, o_t, C)
        b_shift_m = load_vector(shift + i_n * stride_shift, o_m, C)
        b_shift_t = load_vector(shift + i_n * stride_shift, o_t, C)
        if y is not None:
            b_gate_m = load_vector(gate + i_n * stride_gate, o_m, C)
            b_gate_t = load_vector(gate + i_n * stride_gate, o_t, C)
        for i in range(row, end):
            o_x = i * C
            b_m = load_vector(x + o_x, o_m, C)
            b_t = load_vector(x + o_x, o_t, C)
            if y is not None:
                b_m += b_gate_m * load_vector(y + o_x, o_m, C)
                b_t += b_gate_t * load_vector(y + o_x, o_t, C)
                store_vector(z + o_x, b_m, o_m, C)
                store_vector(z + o_x, b_t, o_t, C)
                # Backward and the next layer see z rounded, so the statistics are those of the rounded z.
                b_m = b_m.to(z.dtype.element_ty).to(tl.float32)
                b_t = b_t.to(z.dtype.element_ty).to(tl.float32)
            b_mean = (tl.sum(b_m, 0) + tl.sum(b_t, 0)) / C
            b_m -= b_mean
            b_t = tl.where(o_t < C, b_t - b_mean, 0.0)
            b_rstd = 1 / tl.sqrt_rn((tl.sum(b_m * b_m, 0) + tl.sum(b_t * b_t, 0)) / C + eps)
            b_m = b_m * b_rstd * b_scale_m + b_shift_m
            b_t = b_t * b_rstd * b_scale_t + b_shift_t
            store_vector(out + o_x, b_m, o_m, C)
            store_vector(out + o_x, b_t, o_t, C)
            tl.store(mean + i, b_mean)
            tl.store(rstd + i, b_rstd)
        row = end
        i_n += 1


@triton.jit
def adaln_bwd_kernel(
    dout,
    dz,
    z,
    y,
    gate,
    scale,
    mean,
    rstd,
    dx,
    dy,
    slots_shift,
    slots_scale,
    slots_gate,
    cu_seqlens,
    num_rows,
    seq_len,
    num_segments,
    stride_gate,
    stride_scale,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Fused with the gated residual where y is given; otherwise dz, y, gate, dy and slots_gate are None."""
    i_p = tl.program_id(0).to(tl.int64)
    row = i_p * CHUNK
    last = tl.minimum(row + CHUNK, num_rows)
    i_n = segment_of_row(cu_seqlens, row, seq_len, num_segments)
    o_m = tl.arange(0, MAIN)
    o_t = MAIN + tl.arange(0, TAIL)
    while row < last:
        end = tl.minimum(last, segment_start(cu_seqlens, i_n + 1, seq_len))
        b_scale_m = 1 + load_vector(scale + i_n * stride_scale, o_m, C)
        b_scale_t = 1 + load_vector(scale + i_n * stride_scale, o_t, C)
        a_shift_m = tl.zeros([MAIN], dtype=tl.float32)
        a_shift_t = tl.zeros([TAIL], dtype=tl.float32)
        a_scale_m = tl.zeros([MAIN], dtype=tl.float32)
        a_scale_t = tl.zeros([TAIL], dtype=tl.float32)
        if y is not None:
            b_gate_m = load_vector(gate + i_n * stride_gate, o_m, C)
            b_gate_t = load_vector(gate + i_n * stride_gate, o_t, C)
            a_gate_m = tl.zeros([MAIN], dtype=tl.float32)
            a_gate_t = tl.zeros([TAIL], dtype=tl.float32)
        for i in range(row, end):
            o_x = i * C
            b_mean = tl.load(mean + i)
            b_rstd = tl.load(rstd + i)
            d_m = load_vector(dout + o_x, o_m, C)
            d_t = load_vector(dout + o_x, o_t, C)
            # Normalised rows; columns beyond C must not enter the sums, and there dout is 0.
            n_m = (load_vector(z + o_x, o_m, C) - b_mean) * b_rstd
            n_t = (load_vector(z + o_x, o_t, C) - b_mean) * b_rstd
            a_shift_m += d_m
            a_shift_t += d_t
            a_scale_m += d_m * n_m
            a_scale_t += d_t * n_t
            d_m *= b_scale_m
            d_t *= b_scale_t
            b_mean_d = (tl.sum(d_m, 0) + tl.sum(d_t, 0)) / C
            b_mean_dn = (tl.sum(d_m * n_m, 0) + tl.sum(d_t * n_t, 0)) / C
            d_m = (d_m - b_mean_d - n_m * b_mean_dn) * b_rstd
            d_t = (d_t - b_mean_d - n_t * b_mean_dn) * b_rstd
            if y is not None:
                d_m += load_vector(dz + o_x, o_m, C)
                d_t += load_vector(dz + o_x, o_t, C)
                store_vector(dy + o_x, b_gate_m * d_m, o_m, C)
                store_vector(dy + o_x, b_gate_t * d_t, o_t, C)
                a_gate_m += d_m * load_vector(y + o_x, o_m, C)
                a_gate_t += d_t * load_vector(y + o_x, o_t, C)
            store_vector(dx + o_x, d_m, o_m, C)
            store_vector(dx + o_x, d_t, o_t, C)
        o_slot = (i_p + i_n) * C
        store_vector(slots_shift + o_slot, a_shift_m, o_m, C)
        store_vector(slots_shift + o_slot, a_shift_t, o_t, C)
        store_vector(slots_scale + o_slot, a_scale_m, o_m, C)
        store_vector(slots_scale + o_slot, a_scale_t, o_t, C)
        if y is not None:
            store_vector(slots_gate + o_slot, a_gate_m, o_m, C)
            store_vector(slots_gate + o_slot, a_gate_t, o_t, C)
        row = end
        i_n += 1
