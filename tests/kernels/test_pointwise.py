"""longreel.kernels.pointwise against PyTorch's own modules, by gradcheck, packed and with bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from longreel.kernels import adaln_modulate, bias_gelu, gated_residual
from longreel.kernels.numerics import KERNEL_ERROR_FACTOR, relative_error
from longreel.kernels.pointwise import adaln_modulate_op, bias_gelu_op, gated_residual_op

BATCH, TOKENS, WIDTH = 2, 5, 24


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def adaln_eager(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gated_eager(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate.unsqueeze(1) * y


def gelu_eager(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


X, ROW = (BATCH, TOKENS, WIDTH), (BATCH, WIDTH)
OPS = {
    "adaln": (adaln_modulate, adaln_eager, (X, ROW, ROW)),
    "gated": (gated_residual, gated_eager, (X, X, ROW)),
    "gelu": (bias_gelu, gelu_eager, (X, (WIDTH,))),
}


def with_grads(fn, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    out = fn(*inputs)
    return [out.detach(), *torch.autograd.grad((out * torch.randn(out.shape, dtype=out.dtype)).sum(), inputs)]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("name", OPS)
def test_equals_eager_pytorch(name):
    op, eager, shapes = OPS[name]
    inputs = tensors(*shapes)
    for a, b in zip(with_grads(op, inputs), with_grads(eager, inputs), strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_error_in_low_precision_is_that_of_rounding(name, dtype):
    op, eager, shapes = OPS[name]
    rounded = [t.detach().to(dtype).requires_grad_() for t in tensors(*shapes)]
    want = with_grads(eager, [t.detach().double().requires_grad_() for t in rounded])
    for a, e, b in zip(with_grads(op, rounded), with_grads(eager, rounded), want, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) <= KERNEL_ERROR_FACTOR * relative_error(e, b) + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", OPS)
def test_gradcheck_and_compile(name):
    op, _, shapes = OPS[name]
    inputs = tensors(*shapes)
    assert torch.autograd.gradcheck(op, inputs)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), op(*inputs))


def test_ops_pass_opcheck():
    x, y, shift, scale = tensors(X, X, ROW, ROW)
    opcheck(adaln_modulate_op, (x, shift, scale, 1e-6, None, "torch"))
    opcheck(gated_residual_op, (x, y, scale, None, "torch"))
    opcheck(bias_gelu_op, (x, tensors((WIDTH,))[0], "torch"))
    packed, rows = tensors((1, 6, WIDTH), (3, WIDTH))
    opcheck(adaln_modulate_op, (packed, rows, rows.detach().clone(), 1e-6, torch.tensor([0, 2, 2, 6]), "torch"))
    opcheck(gated_residual_op, (packed, packed.detach().clone(), rows, torch.tensor([0, 2, 2, 6]), "torch"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_segments_use_their_own_row(dtype):
    x, y, shift, scale = tensors((1, 7, WIDTH), (1, 7, WIDTH), (3, WIDTH), (3, WIDTH))
    bounds = torch.tensor([0, 3, 3, 7], dtype=dtype)

    def separate(op, *inputs: Tensor) -> Tensor:
        *whole, a, b = inputs
        return torch.cat(
            [op(*(t[:, i:j] for t in whole), a[n : n + 1], b[n : n + 1]) for n, i, j in ((0, 0, 3), (2, 3, 7))], 1
        )

    got = with_grads(lambda *t: adaln_modulate(*t, cu_seqlens=bounds), [x, shift, scale])
    want = with_grads(lambda *t: separate(adaln_eager, *t), [x, shift, scale])
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-13
    got = with_grads(lambda *t: gated_residual(*t, cu_seqlens=bounds), [x, y, scale])
    want = with_grads(
        lambda p, q, g: separate(lambda a, b, gate, _: gated_eager(a, b, gate), p, q, g, g), [x, y, scale]
    )
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x, row: adaln_modulate(x, row[:1], row), r"shift must be \[2, 24\] for x \[2, 5, 24\], got \[1, 24\]"),
        (lambda x, row: adaln_modulate(x, row, row.half()), "scale has dtype torch.float16, x has torch.float64"),
        (lambda x, row: adaln_modulate(x[0], row, row), r"x must be \[B, S, C\]"),
        (lambda x, row: adaln_modulate(x, row, row, cu_seqlens=torch.tensor([0, 5])), "x has batch 2"),
        (lambda x, row: gated_residual(x, x[:, :2], row), r"y \[2, 2, 24\] must have x's shape \[2, 5, 24\]"),
        (lambda x, row: gated_residual(x[:1], x[:1], row, cu_seqlens=torch.tensor([0, 2, 4])), "end at the length 5"),
        (lambda x, row: bias_gelu(x, row), r"bias must be \[24\]"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(*tensors(X, ROW))
