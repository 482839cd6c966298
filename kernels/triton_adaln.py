"""adaLN modulate by Triton, alone and after a gated residual: one pass over the rows forward, one backward.

The kernels are in triton_adaln_kernels. Shapes: x, y, z, out [B, S, C] contiguous; gate, shift, scale [N, C] with any
row stride; mean, rstd [B, S] fp32.
Bytes moved, n = B S C elements of e bytes: 2 n e forward and 3 n e backward; fused 4 n e and 6 n e, where the separate
ops move 5 n e and 9 n e.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
from torch import Tensor

from longreel.kernels.triton_adaln_kernels import adaln_bwd_kernel, adaln_fwd_kernel
from longreel.kernels.triton_common import launch_on
from longreel.kernels.triton_rows import (
    count_segments,
    new_slots,
    rows_per_program,
    split_columns,
    sum_slots,
    unit_columns,
    unit_offsets,
)
from longreel.kernels.triton_rows_tuning import row_tiles

# Assumed: most warps that share a row.
MAX_WARPS = 16


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
    tiles = row_tiles("adaln_fwd" if y is None else "gated_adaln_fwd", rows)
    chunk = rows_per_program(rows, tiles.max_chunk)
    options = row_options(x.shape[-1], tiles.per_warp)
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
            unit_offsets(cu_seqlens),
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
    tiles = row_tiles("adaln_bwd" if y is None else "gated_adaln_bwd", rows)
    chunk = rows_per_program(rows, tiles.max_chunk)
    options = row_options(z.shape[-1], tiles.per_warp)
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
                unit_offsets(cu_seqlens),
                rows,
                z.shape[1],
                num_segments,
                0 if gate is None else gate.stride(0),
                scale.stride(0),
                CHUNK=chunk,
                **options,
            )
    return dx, [sum_slots(part, z.new_empty(scale.shape), cu_seqlens, z.shape[1], chunk) for part in slots]
