"""The final layer over tiles of rows, as a custom op: longreel::tiled_final. No modulated [s, C] buffer ever lives.

y = (LayerNorm(x) (1 + scale) + shift) W^T + b, computed and differentiated tile by tile; backward computes each tile's
modulated rows and statistics again, so that of the forward only x is kept. Memory: a tile of n rows holds about 3 n C
elements where the plain layer keeps s C and has 2 s C at its peak; work: adaLN once more. Gradients of what all rows
share add up in fp32 (fp64 for fp64), in tile order.
Source: Bekman et al. 2025, ALST (arXiv:2506.13996), which tiles MLP and loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longreel.kernels.pointwise import adaln_modulate_backward_op, adaln_modulate_op, resolve_pointwise_provider
from longreel.kernels.reference import compute_dtype

_EPS = 1e-6


def _tiles(x: Tensor, tile: int, segments: Tensor | None) -> Iterator[tuple[int, slice, Tensor | None]]:
    """(sample, rows, segments among them) of every tile; a tile is of one sample, or of several packed clips."""
    for sample in range(x.shape[0]):
        for start in range(0, x.shape[1], tile):
            rows = slice(start, min(start + tile, x.shape[1]))
            # Clips that have no rows in the tile are empty.
            inside = None if segments is None else (segments - start).clamp(0, rows.stop - start)
            yield sample, rows, inside


def _rows_of(values: Tensor, sample: int, segments: Tensor | None) -> Tensor:
    """What modulates a tile: the sample's row of [B, C], or all rows of [N, C] of packed clips."""
    return values[sample : sample + 1] if segments is None else values


@torch.library.custom_op("longreel::tiled_final", mutates_args=())
def tiled_final_op(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, segments: Tensor | None, tile: int
) -> Tensor:
    """Forward op; see tiled_final()."""
    y = x.new_empty(*x.shape[:2], weight.shape[0])
    provider = resolve_pointwise_provider("auto", x)
    for sample, rows, inside in _tiles(x, tile, segments):
        shared = _rows_of(shift, sample, segments), _rows_of(scale, sample, segments)
        modulated, _, _ = adaln_modulate_op(x[sample : sample + 1, rows], *shared, _EPS, inside, provider)
        torch.addmm(bias, modulated[0], weight.t(), out=y[sample, rows])
    return y


@torch.library.custom_op("longreel::tiled_final_backward", mutates_args=())
def tiled_final_backward_op(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, segments: Tensor | None, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dshift, dscale, dweight, dbias."""
    dx = x.new_empty(x.shape)
    dtype = compute_dtype(x.dtype)
    dshift, dscale, dweight = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (shift, scale, weight))
    provider = resolve_pointwise_provider("auto", x)
    for sample, rows, inside in _tiles(x, tile, segments):
        part, dpart = x[sample : sample + 1, rows], dy[sample, rows]
        own_scale = _rows_of(scale, sample, segments)
        modulated, mean, rstd = adaln_modulate_op(
            part, _rows_of(shift, sample, segments), own_scale, _EPS, inside, provider
        )
        dweight += dpart.t() @ modulated[0]
        dmodulated = F.linear(dpart, weight.t()).unsqueeze(0)
        grads = adaln_modulate_backward_op(dmodulated, part, own_scale, mean, rstd, inside, provider)
        dx[sample, rows] = grads[0][0]
        for total, grad in ((dshift, grads[1]), (dscale, grads[2])):
            _rows_of(total, sample, segments).add_(grad)
    dbias = dy.sum((0, 1), dtype=dtype)
    return dx, dshift.to(shift.dtype), dscale.to(scale.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


@tiled_final_op.register_fake
def _(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, segments: Tensor | None, tile: int
) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


@tiled_final_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, segments: Tensor | None, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dshift, dscale, dweight = (t.new_empty(t.shape) for t in (shift, scale, weight))
    return x.new_empty(x.shape), dshift, dscale, dweight, weight.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, shift, scale, weight, _, segments, ctx.tile = inputs
    ctx.save_for_backward(x, shift, scale, weight, segments)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *tiled_final_backward_op(dy, *ctx.saved_tensors, ctx.tile), None, None


tiled_final_op.register_autograd(_grad, setup_context=_save)


@register_flop_formula(torch.ops.longreel.tiled_final)
def _flops(x: Any, shift: Any, scale: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0] * weight[1]


@register_flop_formula(torch.ops.longreel.tiled_final_backward)
def _backward_flops(dy: Any, x: Any, shift: Any, scale: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(x, shift, scale, weight)


def tiled_final(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, *, segments: Tensor | None, tile: int
) -> Tensor:
    """adaln_modulate(x, shift, scale) weight^T + bias, tile rows at a time.

    Args:
        x: [B, s, C]. shift, scale: [B, C], or [N, C] of N clips packed into one sequence (B = 1).
        weight: [C_out, C]. bias: [C_out].
        segments: [N + 1] offsets of packed clips among the s rows, or None.
        tile: rows of a tile, at least 1.

    Returns:
        [B, s, C_out] in x's dtype.

    Raises:
        ValueError: tile is below 1.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1 row, got {tile}")
    return tiled_final_op(x, shift, scale, weight, bias, segments, tile)
