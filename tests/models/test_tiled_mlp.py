"""longreel.models.tiled_mlp: the MLP by tiles equals the MLP at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from longreel.kernels.numerics import relative_error
from longreel.models.tiled_mlp import tiled_mlp, tiled_mlp_op


def inputs(*, rows: int = 13, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, rows, 12), (48, 12), (48,), (12, 48), (12,))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def at_once(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


@pytest.mark.parametrize("tile", [1, 5, 13, 26, 100])
def test_output_and_gradients_equal_those_at_once(poisoned_empty, tile):
    found = []
    for function in (at_once, lambda *args: tiled_mlp(*args, tile=tile)):
        tensors = inputs()
        y = function(*tensors)
        torch.manual_seed(1)
        y.backward(torch.randn_like(y))
        found.append([y.detach(), *(t.grad for t in tensors)])
    for tiled, whole in zip(found[1], found[0], strict=True):
        assert relative_error(tiled, whole) < 1e-12


def test_no_rows_give_an_empty_result_and_zero_gradients():
    tensors = inputs(rows=0)
    y = tiled_mlp(*tensors, tile=4)
    y.sum().backward()
    assert y.shape == (2, 0, 12)
    assert all(not t.grad.any() for t in tensors)


def test_weight_gradients_add_up_in_fp32():
    # 512 tiles of one row: added in bf16, the sum would stop growing long before the end.
    x, *weights = (t.detach().to(torch.bfloat16).requires_grad_() for t in inputs(rows=256))
    tiled_mlp(x, *weights, tile=1).sum().backward()
    assert torch.equal(weights[3].grad, torch.full_like(weights[3], 512.0))
    reference = [t.detach().double().requires_grad_() for t in (x, *weights)]
    at_once(*reference).sum().backward()
    assert relative_error(weights[0].grad.double(), reference[1].grad) < 0.01


def test_op_passes_opcheck_and_compiles():
    tensors = inputs()
    opcheck(tiled_mlp_op, (*tensors, 5))
    compiled = torch.compile(lambda *args: tiled_mlp(*args, tile=5), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*tensors), tiled_mlp(*tensors, tile=5))


def test_flops_are_counted_with_the_hidden_layer_computed_again():
    product = 2 * 26 * 12 * 48
    with FlopCounterMode(display=False) as counter:
        tiled_mlp(*inputs(), tile=5).sum().backward()
    assert counter.get_total_flops() == 7 * product


def test_a_tile_of_no_rows_is_an_error():
    with pytest.raises(ValueError, match="tile must be at least 1 row, got 0"):
        tiled_mlp(*inputs(), tile=0)
