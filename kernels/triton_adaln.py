"""adaLN modulate in Triton, alone and after a gated residual: one pass over the rows forward, one backward.

    z = x + gate * y                       (only in the fused form; z is rounded, and what follows sees it rounded)
    out = (z - mean) * rstd * (1 + scale) + shift

Shapes: x, y, z, out [B, S, C] contiguous; gate, shift, scale [N, C] with any row stride; mean, rstd [B, S] fp32.
A program takes its rows one by one, each as two powers of two in registers (1152 = 1024 + 128), and keeps the
segment's modulation, and its sums for dshift, dscale and dgate (triton_rows), beside them: one-dimensional blocks, so
that no tile changes its layout between load, reduction and store. Statistics are fp32, mean first and then the centred
squares.
Bytes moved, n = B S C elements of e bytes: 2 n e forward and 3 n e backward; fused 4 n e and 6 n e, where the separate
ops move 5 n e and 9 n e.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longreel.kernels.triton_common import launch_on
from longreel.kernels.triton_rows import (
    count_segments,
    load_vector,
    new_slots,
    rows_per_program,
    segment_of_row,
    segment_start,
    split_columns,
    store_vector,
    sum_slots,
    unit_columns,
)

# Assumed: columns of a row that one warp holds. At C = 1152 that is 1 warp, 2 for backward and for the fused forward, 4
# for the fused backward: loads of 27 KiB and more in flight per multiprocessor by registers, and no spills.
FWD_COLUMNS_PER_WARP = 1280
BWD_COLUMNS_PER_WARP = 640
FUSED_FWD_COLUMNS_PER_WARP = 640
FUSED_BWD_COLUMNS_PER_WARP = 320
MAX_WARPS = 16


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


def adaln_modulate_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.adaln_modulate_fwd."""
    return _forward(x, None, shift, scale, eps, cu_seqlens)[1:]


def gated_residual_adaln_fwd(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.gated_residual_adaln_fwd."""
    return _forward(x, (y.contiguous(), unit_columns(gate)), shift, scale, eps, cu_seqlens)


def adaln_modulate_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.adaln_modulate_bwd."""
    dx, (dshift, dscale) = _backward(dy, None, x, scale, mean, rstd, cu_seqlens)
    return dx, dshift, dscale


def gated_residual_adaln_bwd(
    dz: Tensor,
    dmodulated: Tensor,
    y: Tensor,
    z: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As reference.gated_residual_adaln_bwd."""
    dy = y.new_empty(y.shape)
    residual = (dz.contiguous(), y.contiguous(), unit_columns(gate), dy)
    dx, (dshift, dscale, dgate) = _backward(dmodulated, residual, z, scale, mean, rstd, cu_seqlens)
    return dx, dy, dgate, dshift, dscale


def row_options(columns: int, columns_per_warp: int) -> dict[str, int]:
    """Launch options of a program whose blocks are rows of this many columns."""
    main, tail = split_columns(columns)
    num_warps = min(MAX_WARPS, triton.next_power_of_2(triton.cdiv(columns, columns_per_warp)))
    return {"C": columns, "MAIN": main, "TAIL": tail, "num_warps": num_warps}


def _forward(
    x: Tensor,
    residual: tuple[Tensor, Tensor] | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z, out, mean, rstd), residual being (y, gate); z is x without it."""
    x, shift, scale = x.contiguous(), unit_columns(shift), unit_columns(scale)
    y, gate = residual or (None, None)
    z = x if y is None else x.new_empty(x.shape)
    out = x.new_empty(x.shape)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if not x.numel():
        return z, out, mean, rstd
    rows = mean.numel()
    chunk = rows_per_program(rows)
    options = row_options(x.shape[-1], FWD_COLUMNS_PER_WARP if y is None else FUSED_FWD_COLUMNS_PER_WARP)
    with launch_on(x):
        adaln_fwd_kernel[(triton.cdiv(rows, chunk),)](
            x,
            y,
            gate,
            shift,
            scale,
            None if y is None else z,
            out,
            mean,
            rstd,
            cu_seqlens,
            rows,
            x.shape[1],
            count_segments(x, cu_seqlens),
            0 if gate is None else gate.stride(0),
            shift.stride(0),
            scale.stride(0),
            eps,
            CHUNK=chunk,
            **options,
        )
    return z, out, mean, rstd


def _backward(
    dout: Tensor,
    residual: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    z: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """dx and [dshift, dscale], or [dshift, dscale, dgate] where residual is (dz, y, gate, dy), dy to be filled."""
    dout, z, scale = dout.contiguous(), z.contiguous(), unit_columns(scale)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    dz, y, gate, dy = residual or (None, None, None, None)
    dx = z.new_empty(z.shape)
    rows = mean.numel()
    chunk = rows_per_program(rows)
    options = row_options(z.shape[-1], BWD_COLUMNS_PER_WARP if y is None else FUSED_BWD_COLUMNS_PER_WARP)
    num_segments = count_segments(z, cu_seqlens)
    slots = [new_slots(z, rows, chunk, num_segments) for _ in range(2 if y is None else 3)]
    if z.numel():
        with launch_on(z):
            adaln_bwd_kernel[(triton.cdiv(rows, chunk),)](
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
                slots[0],
                slots[1],
                None if y is None else slots[2],
                cu_seqlens,
                rows,
                z.shape[1],
                num_segments,
                0 if gate is None else gate.stride(0),
                scale.stride(0),
                CHUNK=chunk,
                **options,
            )
    return dx, [sum_slots(part, z.new_empty(scale.shape), cu_seqlens, z.shape[1], chunk) for part in slots]
