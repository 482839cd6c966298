"""gelu_tanh(x + bias) in Triton, forward and backward; backward recomputes from x and bias.

With a(u) = sqrt(2 / pi) (u + 0.044715 u^3), 0.5 (1 + tanh a) is s = sigmoid(2 a): gelu = u s, and its slope is
s + 2 u s (1 - s) a'(u). One exponential e = exp(-2 a) and one division an element; 1 - s is e s, without cancellation.
Shapes: x [M, C] contiguous, bias [C]; dbias through slots (triton_rows).
Bytes moved, n = M C elements of e bytes: 2 n e forward, 3 n e backward.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longreel.kernels.triton_common import launch_on
from longreel.kernels.triton_residual import TILE_COLUMNS, tile_options
from longreel.kernels.triton_rows import (
    load_tile,
    load_vector,
    new_slots,
    store_tile,
    store_vector,
    sum_slots,
)
from longreel.kernels.triton_rows_tuning import RowKernel


@triton.jit
def gelu_gate(u):
    """s = sigmoid(2 a(u)) and 1 - s of u of -10 and more; the constant is 2 sqrt(2 / pi)."""
    e = tl.exp(-1.5957691216057308 * u * (1 + 0.044715 * u * u))
    s = 1 / (1 + e)
    return s, e * s


@triton.jit
def bias_gelu_fwd_kernel(
    x,
    bias,
    y,
    num_rows,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    NUM_C: tl.constexpr = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // NUM_C * CHUNK
    o_col = (pid % NUM_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_bias = load_vector(bias, o_col, C)
    for i in range(row, tl.minimum(row + CHUNK, num_rows), ROWS):
        o_row = i + tl.arange(0, ROWS).to(tl.int64)
        m_row = o_row < num_rows
        # At -10 the gate is 1e-38 and e still finite: below, y is as small whatever u is. A NaN stays one.
        u = tl.maximum(load_tile(x, o_row, o_col, m_row, C) + b_bias[None, :], -10.0, tl.PropagateNan.ALL)
        s, _ = gelu_gate(u)
        store_tile(y, u * s, o_row, o_col, m_row, C)


@triton.jit
def bias_gelu_bwd_kernel(
    dy,
    x,
    bias,
    dx,
    slots,
    num_rows,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    NUM_C: tl.constexpr = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0).to(tl.int64)
    i_p = pid // NUM_C
    row = i_p * CHUNK
    o_col = (pid % NUM_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_bias = load_vector(bias, o_col, C)
    # Summed over rows once, at the end: until then every thread adds to its own elements.
    acc = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    for i in range(row, tl.minimum(row + CHUNK, num_rows), ROWS):
        o_row = i + tl.arange(0, ROWS).to(tl.int64)
        m_row = o_row < num_rows
        u = load_tile(x, o_row, o_col, m_row, C) + b_bias[None, :]
        # Beyond, the slope is 0 or 1, and the square of a large u no number.
        u = tl.minimum(tl.maximum(u, -10.0, tl.PropagateNan.ALL), 10.0, tl.PropagateNan.ALL)
        s, rest = gelu_gate(u)
        slope = s + u * s * rest * (1.5957691216057308 * (1 + 0.134145 * u * u))
        b_dx = load_tile(dy, o_row, o_col, m_row, C) * slope
        acc += b_dx
        store_tile(dx, b_dx, o_row, o_col, m_row, C)
    store_vector(slots + i_p * C, tl.sum(acc, 0), o_col, C)


def bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    """As reference.bias_gelu_fwd."""
    x, bias = x.contiguous(), bias.contiguous()
    y = x.new_empty(x.shape)
    if not y.numel():
        return y
    rows, grid, options = _launch(x, "gelu_fwd")
    with launch_on(x):
        bias_gelu_fwd_kernel[grid](x, bias, y, rows, **options)
    return y


def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As reference.bias_gelu_bwd."""
    dy, x, bias = dy.contiguous(), x.contiguous(), bias.contiguous()
    dx = x.new_empty(x.shape)
    if not dx.numel():
        return dx, bias.new_zeros(bias.shape)
    rows, grid, options = _launch(x, "gelu_bwd")
    chunk, columns = options["CHUNK"], options["C"]
    slots = new_slots(x, rows, chunk, 1)
    with launch_on(x):
        bias_gelu_bwd_kernel[grid](dy, x, bias, dx, slots, rows, **options)
    # One segment: all rows.
    dbias = sum_slots(slots, bias.new_empty(1, columns), None, rows, chunk)
    return dx, dbias.view(columns)


def _launch(x: Tensor, kernel: RowKernel) -> tuple[int, tuple[int], dict[str, int]]:
    """(rows, grid, options); column blocks of a row chunk are neighbouring programs."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    options = tile_options(kernel, rows, columns)
    return rows, (triton.cdiv(columns, TILE_COLUMNS) * triton.cdiv(rows, options["CHUNK"]),), options
