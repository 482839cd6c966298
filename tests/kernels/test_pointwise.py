"""longreel.kernels.pointwise against PyTorch's own modules, by gradcheck, packed and with bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from longreel.kernels import (
    adaln_modulate,
    bias_gelu,
    gated_residual,
    gated_residual_adaln,
    resolve_pointwise_provider,
    triton_common,
)
from longreel.kernels.numerics import KERNEL_ERROR_FACTOR, relative_error
from longreel.kernels.pointwise import adaln_modulate_op, bias_gelu_op, gated_residual_op
from longreel.kernels.residual_adaln import gated_residual_adaln_op

BATCH, TOKENS, WIDTH = 2, 5, 24


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def adaln_eager(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gated_eager(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate.unsqueeze(1) * y


def fused_eager(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    z = gated_eager(x, y, gate)
    return z, adaln_eager(z, shift, scale)


def gelu_eager(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


X, ROW = (BATCH, TOKENS, WIDTH), (BATCH, WIDTH)
OPS = {
    "adaln": (adaln_modulate, adaln_eager, (X, ROW, ROW)),
    "gated": (gated_residual, gated_eager, (X, X, ROW)),
    "fused": (gated_residual_adaln, fused_eager, (X, X, ROW, ROW, ROW)),
    "gelu": (bias_gelu, gelu_eager, (X, (WIDTH,))),
}


def with_grads(fn, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    outs = as_tuple(fn(*inputs))
    grads = torch.autograd.grad(outs, inputs, [torch.randn(out.shape, dtype=out.dtype) for out in outs])
    return [*(out.detach() for out in outs), *grads]


def as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value


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
    for a, b in zip(as_tuple(compiled(*inputs)), as_tuple(op(*inputs)), strict=True):
        assert torch.equal(a, b)


def test_results_are_contiguous_whatever_lies_in_the_inputs():
    x, y, shift, scale = tensors(X, X, ROW, ROW)
    x, y = (t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in (x, y))
    rows = [t.detach().T.contiguous().T.requires_grad_() for t in (shift, scale)]
    opcheck(adaln_modulate_op, (x, *rows, 1e-6, None, "torch"))
    opcheck(gated_residual_op, (x, y, rows[0], None, "torch"))
    opcheck(gated_residual_adaln_op, (x, y, *rows, shift, 1e-6, None, "torch"))
    opcheck(bias_gelu_op, (x, tensors((WIDTH,))[0], "torch"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_fused_op_is_the_two_ops(dtype):
    x, y, gate, shift, scale = tensors(X, X, ROW, ROW, ROW, dtype=dtype)

    def apart(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        z = gated_residual(*inputs[:3])
        return z, adaln_modulate(z, *inputs[3:])

    fused = with_grads(gated_residual_adaln, [x, y, gate, shift, scale])
    pair = with_grads(apart, [x, y, gate, shift, scale])
    # Apart, the gradient of z is rounded twice on its way.
    for name, a, b in zip(("z", "modulated", "dx", "dy", "dgate", "dshift", "dscale"), fused, pair, strict=True):
        if name in ("z", "modulated", "dshift", "dscale"):
            assert torch.equal(a, b), name
        assert relative_error(a, b) <= 2 * torch.finfo(dtype).eps, name


def test_auto_picks_by_device_and_providers_are_named(monkeypatch):
    x = torch.randn(1, 2, 8)
    monkeypatch.setattr(triton_common, "_found", lambda: True)
    assert resolve_pointwise_provider("auto", x) == resolve_pointwise_provider("torch", x) == "torch"
    with pytest.raises(ValueError, match="unknown pointwise provider 'cuda'; providers are auto, torch, triton"):
        resolve_pointwise_provider("cuda", x)
    with FakeTensorMode():
        on_cuda = [torch.empty(2, device="cuda", dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64)]
    assert [resolve_pointwise_provider("auto", t) for t in on_cuda] == ["triton", "triton", "torch"]
    assert resolve_pointwise_provider("torch", on_cuda[0]) == "torch"
    monkeypatch.setattr(triton_common, "_found", lambda: False)
    # Nothing takes Triton's place but what was named.
    for tensor in on_cuda[:2]:
        with pytest.raises(ValueError, match=r"the package triton is not installed; .*, or name provider torch"):
            resolve_pointwise_provider("auto", tensor)
    assert resolve_pointwise_provider("torch", on_cuda[0]) == resolve_pointwise_provider("auto", on_cuda[2]) == "torch"
    assert resolve_pointwise_provider("auto", x) == "torch"


@pytest.mark.parametrize("name", OPS)
def test_triton_on_cpu_is_an_error_with_its_reason(name):
    op, _, shapes = OPS[name]
    with pytest.raises(ValueError, match="needs a CUDA device, got tensors on cpu; set TRITON_INTERPRET=1"):
        op(*tensors(*shapes, dtype=torch.float32), provider="triton")


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


@pytest.mark.parametrize("name", ["adaln", "gated", "fused"])
def test_gradcheck_by_segments(name):
    op, _, shapes = OPS[name]
    # Frames of unequal lengths, one of them empty and one a single token.
    bounds = torch.tensor([0, 2, 2, 3, 5])
    inputs = tensors(*((1, 5, 6) if shape == X else (4, 6) for shape in shapes))
    assert torch.autograd.gradcheck(lambda *t: op(*t, cu_seqlens=bounds), inputs)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x, row: adaln_modulate(x, row[:1], row), r"shift must be \[2, 24\] for x \[2, 5, 24\], got \[1, 24\]"),
        (lambda x, row: adaln_modulate(x, row, row.half()), "scale has dtype torch.float16, x has torch.float64"),
        (lambda x, row: adaln_modulate(x[0], row, row), r"x must be \[B, S, C\]"),
        (lambda x, row: adaln_modulate(x, row, row, cu_seqlens=torch.tensor([0, 5])), "x has batch 2"),
        (lambda x, row: gated_residual(x, x[:, :2], row), r"y \[2, 2, 24\] must have x's shape \[2, 5, 24\]"),
        (lambda x, row: gated_residual(x[:1], x[:1], row, cu_seqlens=torch.tensor([0, 2, 4])), "end at the length 5"),
        (
            lambda x, row: gated_residual(x[:1], x[:1], row, cu_seqlens=torch.tensor([0, 2, 5], device="meta")),
            "cu_seqlens is on meta, the tensor it splits on cpu",
        ),
        (lambda x, row: gated_residual_adaln(x, x[:1], row, row, row), r"y \[1, 5, 24\] must have x's shape"),
        (lambda x, row: gated_residual_adaln(x, x, row, row[:1], row), r"shift must be \[2, 24\]"),
        (lambda x, row: bias_gelu(x, row), r"bias must be \[24\]"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(*tensors(X, ROW))
