"""The MLP over tiles of rows, as a custom op: longreel::tiled_mlp. No hidden layer of the whole sequence ever lives.

y = gelu(x W1^T + b1) W2^T + b2, computed and differentiated tile by tile; backward computes each tile's hidden layer
again, so that of the forward only x is kept. Memory for one tile of n rows, hidden width M: about 4 n M elements
instead of 2 rows M kept and 4 rows M at the peak; work: one more x W1^T in backward. Weight gradients add up in fp32
(fp64 for fp64), in tile order.
Source: Bekman et al. 2025, ALST (arXiv:2506.13996), tiled MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longreel.kernels.pointwise import bias_gelu_backward_op, bias_gelu_op, resolve_pointwise_provider
from longreel.kernels.reference import compute_dtype


def _tiles(rows: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, rows)) for start in range(0, rows, tile))


@torch.library.custom_op("longreel::tiled_mlp", mutates_args=())
def tiled_mlp_op(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, tile: int) -> Tensor:
    """Forward op; see tiled_mlp()."""
    y = x.new_empty(*x.shape[:-1], w2.shape[0])
    rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    provider = resolve_pointwise_provider("auto", x)
    for part in _tiles(len(rows), tile):
        torch.addmm(b2, bias_gelu_op(F.linear(rows[part], w1), b1, provider), w2.t(), out=out[part])
    return y


@torch.library.custom_op("longreel::tiled_mlp_backward", mutates_args=())
def tiled_mlp_backward_op(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1, db1, dw2, db2."""
    dx = x.new_empty(x.shape)
    rows, drows, dout = x.reshape(-1, x.shape[-1]), dx.view(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dtype = compute_dtype(x.dtype)
    dw1, db1, dw2 = (torch.zeros(w.shape, dtype=dtype, device=w.device) for w in (w1, b1, w2))
    provider = resolve_pointwise_provider("auto", x)
    for part in _tiles(len(rows), tile):
        hidden = F.linear(rows[part], w1)
        dw2 += dout[part].t() @ bias_gelu_op(hidden, b1, provider)
        dhidden, dbias = bias_gelu_backward_op(dout[part] @ w2, hidden, b1, provider)
        db1 += dbias
        dw1 += dhidden.t() @ rows[part]
        torch.mm(dhidden, w1, out=drows[part])
    db2 = dout.sum(0, dtype=dtype)
    return dx, dw1.to(w1.dtype), db1.to(b1.dtype), dw2.to(w2.dtype), db2.to(w2.dtype)


@tiled_mlp_op.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, tile: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], w2.shape[0])


@tiled_mlp_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dw1, db1, dw2 = (w.new_empty(w.shape) for w in (w1, b1, w2))
    return x.new_empty(x.shape), dw1, db1, dw2, w2.new_empty(w2.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w1, b1, w2, _, ctx.tile = inputs
    ctx.save_for_backward(x, w1, b1, w2)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *tiled_mlp_backward_op(dy, *ctx.saved_tensors, ctx.tile), None


tiled_mlp_op.register_autograd(_grad, setup_context=_save)


def _flops(x: Any, w1: Any, w2: Any) -> int:
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * (w1[0] * w1[1] + w2[0] * w2[1])


@register_flop_formula(torch.ops.longreel.tiled_mlp)
def _forward_flops(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, tile: int, **_: Any) -> int:
    return _flops(x, w1, w2)


@register_flop_formula(torch.ops.longreel.tiled_mlp_backward)
def _backward_flops(dy: Any, x: Any, w1: Any, b1: Any, w2: Any, tile: int, **_: Any) -> int:
    # Two products per weight, and the first layer once more.
    return 2 * _flops(x, w1, w2) + _flops(x, w1, (0, 0))


def tiled_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, tile: int) -> Tensor:
    """gelu_tanh(x w1^T + b1) w2^T + b2, tile rows at a time.

    Args:
        x: [..., C]. w1: [M, C]. b1: [M]. w2: [C_out, M]. b2: [C_out].
        tile: rows of a tile, at least 1; a tile's hidden layer holds tile * M elements.

    Returns:
        [..., C_out] in x's dtype.

    Raises:
        ValueError: tile is below 1.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1 row, got {tile}")
    return tiled_mlp_op(x, w1, b1, w2, b2, tile)
