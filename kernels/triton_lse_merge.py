"""LSE merge of partial attention outputs in Triton, forward and backward; the formulas are in lse_merge.py.

Shapes: out, dout [B, S, H, D] contiguous, taken as B S H rows of D in two powers of two (72 = 64 + 8); lse [B, H, S]
contiguous fp32, gathered per row: 4 bytes beside a row's 2 D.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longreel.kernels.triton_common import launch_on
from longreel.kernels.triton_rows import load_tile, split_columns, store_tile
from longreel.kernels.triton_rows_tuning import RowKernel, row_tiles


@triton.jit
def lse_offset(o_row, seq_len, heads):
    """Where the lse [B, H, S] of row (b, s, h) lies."""
    o_bs = o_row // heads
    return (o_bs // seq_len * heads + o_row % heads) * seq_len + o_bs % seq_len


@triton.jit
def merge_weights(b_lse1, b_lse2):
    """sigmoid(lse1 - lse2) and sigmoid(lse2 - lse1), exactly 0 for a side of lse -inf, from one exponential."""
    high = tl.maximum(b_lse1, b_lse2)
    none = high == float("-inf")
    # exp(-|lse1 - lse2|): 0 when one side is -inf, and -inf - -inf never computed.
    ratio = tl.exp(tl.minimum(b_lse1, b_lse2) - tl.where(none, 0.0, high))
    larger = 1 / (1 + ratio)
    first = b_lse1 >= b_lse2
    w1 = tl.where(first, larger, ratio * larger)
    w2 = tl.where(first, ratio * larger, larger)
    return tl.where(none, 0.0, w1), tl.where(none, 0.0, w2), ratio


@triton.jit
def load_seen(p_out, b_lse, o_row, o_col, m_row, D: tl.constexpr):
    """Rows of a partial output; 0 where its lse is -inf, whatever is there."""
    return tl.where((b_lse == float("-inf"))[:, None], 0.0, load_tile(p_out, o_row, o_col, m_row, D))


@triton.jit
def merge_attention_fwd_kernel(
    out1,
    lse1,
    out2,
    lse2,
    out,
    lse,
    num_rows,
    seq_len,
    heads,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < num_rows
    o_lse = lse_offset(o_row, seq_len, heads)
    b_lse1 = tl.load(lse1 + o_lse, mask=m_row, other=0.0)
    b_lse2 = tl.load(lse2 + o_lse, mask=m_row, other=0.0)
    w1, w2, ratio = merge_weights(b_lse1, b_lse2)
    # log1p(ratio) for ratio in [0, 1]; below 2^-12 the logarithm of 1 + ratio would lose it, and ratio^2 / 2 is noise.
    b_log = tl.where(ratio < 0.000244140625, ratio, tl.log(1 + ratio))
    b_lse = tl.maximum(b_lse1, b_lse2) + tl.where((w1 + w2) == 0.0, 0.0, b_log)
    tl.store(lse + o_lse, b_lse, mask=m_row)
    o_m = tl.arange(0, MAIN)
    o_t = MAIN + tl.arange(0, TAIL)
    b_m = w1[:, None] * load_seen(out1, b_lse1, o_row, o_m, m_row, D)
    b_t = w1[:, None] * load_seen(out1, b_lse1, o_row, o_t, m_row, D)
    b_m += w2[:, None] * load_seen(out2, b_lse2, o_row, o_m, m_row, D)
    b_t += w2[:, None] * load_seen(out2, b_lse2, o_row, o_t, m_row, D)
    store_tile(out, b_m, o_row, o_m, m_row, D)
    store_tile(out, b_t, o_row, o_t, m_row, D)


@triton.jit
def merge_attention_bwd_kernel(
    dout,
    dlse,
    out1,
    lse1,
    out2,
    lse2,
    dout1,
    dlse1,
    dout2,
    dlse2,
    num_rows,
    seq_len,
    heads,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < num_rows
    o_lse = lse_offset(o_row, seq_len, heads)
    b_lse1 = tl.load(lse1 + o_lse, mask=m_row, other=0.0)
    b_lse2 = tl.load(lse2 + o_lse, mask=m_row, other=0.0)
    w1, w2, _ = merge_weights(b_lse1, b_lse2)
    o_m = tl.arange(0, MAIN)
    o_t = MAIN + tl.arange(0, TAIL)
    d_m = load_tile(dout, o_row, o_m, m_row, D)
    d_t = load_tile(dout, o_row, o_t, m_row, D)
    b_m = load_seen(out1, b_lse1, o_row, o_m, m_row, D) - load_seen(out2, b_lse2, o_row, o_m, m_row, D)
    b_t = load_seen(out1, b_lse1, o_row, o_t, m_row, D) - load_seen(out2, b_lse2, o_row, o_t, m_row, D)
    b_shift = w1 * w2 * (tl.sum(d_m * b_m, 1) + tl.sum(d_t * b_t, 1))
    b_dlse1 = b_shift
    b_dlse2 = -b_shift
    if dlse is not None:
        b_dlse = tl.load(dlse + o_lse, mask=m_row, other=0.0)
        b_dlse1 += w1 * b_dlse
        b_dlse2 += w2 * b_dlse
    tl.store(dlse1 + o_lse, b_dlse1, mask=m_row)
    tl.store(dlse2 + o_lse, b_dlse2, mask=m_row)
    store_tile(dout1, w1[:, None] * d_m, o_row, o_m, m_row, D)
    store_tile(dout1, w1[:, None] * d_t, o_row, o_t, m_row, D)
    store_tile(dout2, w2[:, None] * d_m, o_row, o_m, m_row, D)
    store_tile(dout2, w2[:, None] * d_t, o_row, o_t, m_row, D)


def merge_attention_fwd(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """As reference.merge_attention_fwd."""
    out1, lse1, out2, lse2 = (t.contiguous() for t in (out1, lse1, out2, lse2))
    out, lse = torch.empty_like(out1), torch.empty_like(lse1)
    if out.numel():
        options = row_options("merge_fwd", out1.shape[0] * out1.shape[1], out1.shape[-1])
        with launch_on(out1):
            merge_attention_fwd_kernel[(triton.cdiv(lse.numel(), options["ROWS"]),)](
                out1, lse1, out2, lse2, out, lse, lse.numel(), out1.shape[1], out1.shape[2], **options
            )
    return out, lse


def merge_attention_bwd(
    dout: Tensor, dlse: Tensor | None, out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.merge_attention_bwd."""
    dout, out1, lse1, out2, lse2 = (t.contiguous() for t in (dout, out1, lse1, out2, lse2))
    grads = tuple(torch.empty_like(t) for t in (out1, lse1, out2, lse2))
    if out1.numel():
        options = row_options("merge_bwd", out1.shape[0] * out1.shape[1], out1.shape[-1])
        with launch_on(out1):
            merge_attention_bwd_kernel[(triton.cdiv(lse1.numel(), options["ROWS"]),)](
                dout,
                None if dlse is None else dlse.contiguous(),
                out1,
                lse1,
                out2,
                lse2,
                *grads,
                lse1.numel(),
                out1.shape[1],
                out1.shape[2],
                **options,
            )
    dout1, dlse1, dout2, dlse2 = grads
    return dout1, dlse1, dout2, dlse2


def row_options(kernel: RowKernel, tokens: int, head_dim: int) -> dict[str, int]:
    """Launch options of a program whose blocks are rows of this many columns."""
    tiles = row_tiles(kernel, tokens)
    main, tail = split_columns(head_dim)
    assert tiles.num_warps is not None
    rows = max(1, tiles.elements // main)
    return {"ROWS": rows, "D": head_dim, "MAIN": main, "TAIL": tail, "num_warps": tiles.num_warps}
