"""longreel.models.tiled_final: the final layer by tiles equals the final layer at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from longreel.kernels import adaln_modulate
from longreel.kernels.numerics import relative_error
from longreel.models.dit import FinalLayer
from longreel.models.tiled_final import tiled_final, tiled_final_op

PACKED = torch.tensor([0, 4, 4, 9, 13])


def inputs(*, samples: int = 2, clips: int | None = None, rows: int = 13, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    shapes = ((samples, rows, 12), (clips or samples, 12), (clips or samples, 12), (6, 12), (6,))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def at_once(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, segments: Tensor | None = None
) -> Tensor:
    return torch.nn.functional.linear(adaln_modulate(x, shift, scale, cu_seqlens=segments), weight, bias)


@pytest.mark.parametrize("packed", [False, True], ids=["samples", "packed"])
@pytest.mark.parametrize("tile", [1, 5, 13, 100])
def test_output_and_gradients_equal_those_at_once(poisoned_empty, tile, packed):
    segments = PACKED if packed else None
    found = []
    for tiles in (False, True):
        tensors = inputs(samples=1, clips=4) if packed else inputs()
        y = tiled_final(*tensors, segments=segments, tile=tile) if tiles else at_once(*tensors, segments)
        torch.manual_seed(1)
        y.backward(torch.randn_like(y))
        found.append([y.detach(), *(t.grad for t in tensors)])
    for tiled, whole in zip(found[1], found[0], strict=True):
        assert relative_error(tiled, whole) < 1e-12


def test_no_rows_give_an_empty_result_and_zero_gradients():
    tensors = inputs(rows=0)
    y = tiled_final(*tensors, segments=None, tile=4)
    y.sum().backward()
    assert y.shape == (2, 0, 6)
    assert all(not t.grad.any() for t in tensors)


def test_shared_gradients_add_up_in_fp32():
    # 512 tiles of one row: added in bf16, the sums would stop growing long before the end.
    x, shift, *rest = (t.detach().to(torch.bfloat16).requires_grad_() for t in inputs(samples=1, rows=512))
    rest[1].data.fill_(0.5)
    tiled_final(x, shift, *rest, segments=None, tile=1).sum().backward()
    assert torch.equal(rest[2].grad, torch.full_like(rest[2], 512.0))
    assert torch.equal(shift.grad, torch.full_like(shift, 512 * 6 * 0.5))


def test_op_passes_opcheck_and_compiles():
    opcheck(tiled_final_op, (*inputs(), None, 5))
    opcheck(tiled_final_op, (*inputs(samples=1, clips=4), PACKED, 5))
    tensors = inputs()
    compiled = torch.compile(
        lambda *args: tiled_final(*args, segments=None, tile=5), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(*tensors), tiled_final(*tensors, segments=None, tile=5))


def test_flops_are_those_of_the_projection():
    with FlopCounterMode(display=False) as counter:
        tiled_final(*inputs(), segments=None, tile=5).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 26 * 12 * 6


def test_layer_takes_a_tile():
    torch.manual_seed(0)
    layer = FinalLayer(12, 6).double()
    x, c = torch.randn(2, 13, 12, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    whole = layer(x, c)
    layer.tile = 5
    assert relative_error(layer(x, c), whole) < 1e-12
    with pytest.raises(ValueError, match="tile must be at least 1 row, got 0"):
        tiled_final(*inputs(), segments=None, tile=0)
