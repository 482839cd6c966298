"""The Triton kernels of the memory-bound ops: interpreted against fp64, and run on a GPU.

bf16 is left to the GPU: the interpreter rounds to it by cutting bits off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longreel.kernels import adaln_modulate, bias_gelu, gated_residual, gated_residual_adaln
from longreel.kernels.numerics import KERNEL_ERROR_FACTOR, relative_error

pytest.importorskip("triton")

# Batch, tokens, width, offsets of packed segments: a column block that is not full, the production width, powers of two
# and one less, one row, one column, empty segments at both ends and in the middle.
SHAPES: dict[str, tuple[int, int, int, list[int] | None]] = {
    "B2-S7-C72": (2, 7, 72, None),
    "B3-S11-C7": (3, 11, 7, None),
    "B2-S2-C1152": (2, 2, 1152, None),
    "B1-S1-C64": (1, 1, 64, None),
    "B2-S3-C1": (2, 3, 1, None),
    "packed-S37-C40": (1, 37, 40, [0, 0, 3, 3, 37, 37]),
    "packed-S12-C130": (1, 12, 130, [0, 1, 2, 9, 12]),
    # Frames of one length; a single token, in the last of two segments; one segment.
    "frames-S12-C24": (1, 12, 24, [0, 4, 8, 12]),
    "packed-S1-C24": (1, 1, 24, [0, 0, 1]),
    "packed-one-S5-C8": (1, 5, 8, [0, 5]),
}


def rows_of(value: Tensor, x: Tensor, bounds: list[int] | None) -> Tensor:
    if bounds is None:
        return value.unsqueeze(1)
    lengths = torch.tensor(bounds, device=x.device).diff()
    return value.repeat_interleave(lengths, dim=0).unsqueeze(0)


def eager(name: str, bounds: list[int] | None) -> Callable[..., Any]:
    """The op in eager PyTorch: every step in the inputs' own dtype."""

    def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + rows_of(scale, x, bounds)) + rows_of(shift, x, bounds)

    def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return x + rows_of(gate, x, bounds) * y

    def fused(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        z = gated(x, y, gate)
        return z, adaln(z, shift, scale)

    def gelu(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate="tanh")

    return {"adaln": adaln, "gated": gated, "fused": fused, "gelu": gelu}[name]


OPS: dict[str, tuple[Callable[..., Any], str]] = {
    "adaln": (adaln_modulate, "xrr"),
    "gated": (gated_residual, "xxr"),
    "fused": (gated_residual_adaln, "xxrrr"),
    "gelu": (bias_gelu, "xb"),
}
PACKED_OPS = {"adaln", "gated", "fused"}


def make_inputs(name: str, shape: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict[str, Any]]:
    batch, seq_len, width, bounds = SHAPES[shape]
    rows = batch if bounds is None else len(bounds) - 1
    sizes = {"x": (batch, seq_len, width), "r": (rows, width), "b": (width,)}
    torch.manual_seed(0)
    # An offset beside the spread of x: statistics in one pass of half precision would lose it.
    inputs = [(torch.randn(sizes[kind]) + 2 * (kind == "x")).to(dtype).to(device) for kind in OPS[name][1]]
    packed = bounds is not None and name in PACKED_OPS
    return inputs, {"cu_seqlens": torch.tensor(bounds, device=device)} if packed else {}


def with_grads(fn: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outs = fn(*leaves)
    outs = (outs,) if isinstance(outs, Tensor) else outs
    torch.manual_seed(1)
    upstream = [torch.randn(out.shape, dtype=torch.float16).to(out) for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, upstream)]


def poison_allocations(patch: pytest.MonkeyPatch) -> None:
    def poisoned(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a, **k: (lambda t: t.fill_(float("nan")) if t.is_floating_point() else t)(real(*a, **k))

    for owner, attribute in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        patch.setattr(owner, attribute, poisoned(getattr(owner, attribute)))


def errors(name: str, shape: str, dtype: torch.dtype, min_programs: int, device: str) -> list[tuple[float, float]]:
    """(error of Triton, error of eager) against fp64 for every output and gradient; min_programs sets CHUNK."""
    from longreel.kernels import triton_rows

    inputs, packing = make_inputs(name, shape, dtype, device)
    definition = eager(name, SHAPES[shape][3] if packing else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_rows, "MIN_PROGRAMS", min_programs)
        poison_allocations(patch)
        got = with_grads(lambda *t: OPS[name][0](*t, **packing, provider="triton"), inputs)
    same = with_grads(definition, inputs)
    want = with_grads(definition, [t.double() for t in inputs])
    assert [t.dtype for t in got] == [dtype] * len(want)
    return [(relative_error(a, w), relative_error(e, w)) for a, e, w in zip(got, same, want, strict=True)]


def within_the_bar(pairs: list[tuple[float, float]], dtype: torch.dtype) -> None:
    for got, same in pairs:
        assert got <= KERNEL_ERROR_FACTOR * same + torch.finfo(dtype).eps


# A gated residual takes milliseconds to interpret, a row of adaLN ten: the rest of its grid is slow.
GRID = [
    pytest.param(
        name,
        shape,
        dtype,
        id=f"{name}-{shape}-{str(dtype).removeprefix('torch.')}",
        marks=pytest.mark.slow if dtype == torch.float16 and shape not in ("B2-S7-C72", "packed-S12-C130") else (),
    )
    for name in OPS
    for shape in SHAPES
    for dtype in (torch.float32, torch.float16)
    # Without segments these shapes show nothing new.
    if name in PACKED_OPS or SHAPES[shape][3] is None
]


@pytest.mark.parametrize(("name", "shape", "dtype"), GRID)
def test_errs_as_eager_does(run_interpreted, name, shape, dtype):
    # fp32: as many programs as there are rows, fp16: all rows in one.
    within_the_bar(run_interpreted(errors, name, shape, dtype, 1056 if dtype == torch.float32 else 1, "cpu"), dtype)


def corners() -> None:
    """What a grid of shapes does not show."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    shift, scale, gate = torch.randn(2, 3 * 24).chunk(3, dim=-1)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for strided in ((turned, y, gate, shift, scale), (x, y, gate.T.contiguous().T, shift, scale)):
        got = with_grads(lambda *t: gated_residual_adaln(*t, provider="triton"), [x, y, gate, shift, scale])
        # clone() in with_grads would straighten the strides: call on them.
        outs = gated_residual_adaln(*strided, provider="triton")
        assert all(o.is_contiguous() for o in outs)
        assert torch.equal(outs[0], got[0]) and torch.equal(outs[1], got[1])
    # A sum's gradient arrives expanded from one element.
    leaf = x.clone().requires_grad_()
    grads = [
        torch.autograd.grad(adaln_modulate(leaf, shift, scale, provider=p).sum(), leaf)[0] for p in ("triton", "torch")
    ]
    assert relative_error(*grads) < 1e-4
    # No rows: empty results, zero gradients of what modulates.
    empty = x[:, :0]
    for name, inputs in {
        "adaln": [empty, shift, scale],
        "gated": [empty, empty, gate],
        "fused": [empty, empty, gate, shift, scale],
        "gelu": [empty, shift[0]],
    }.items():
        results = with_grads(lambda *t, op=OPS[name][0]: op(*t, provider="triton"), inputs)
        assert all(not t.any() for t in results)
    # NaN stays in its row, forward, and in its segment's sums, backward.
    dirty = x.clone()
    dirty[0, 2, 3] = float("nan")
    out, dx, dshift, dscale = with_grads(lambda *t: adaln_modulate(*t, provider="triton"), [dirty, shift, scale])
    assert out.isnan().any(-1).nonzero().tolist() == dx.isnan().any(-1).nonzero().tolist() == [[0, 2]]
    assert not dshift.isnan().any() and dscale.isnan().any(-1).tolist() == [True, False]
    with pytest.raises(
        ValueError, match=r"takes bfloat16, float16 and float32, got torch\.float64; use provider 'torch'"
    ):
        bias_gelu(x.double(), shift[0].double(), provider="triton")


def test_corners(run_interpreted):
    run_interpreted(corners)


def strided_offsets(name: str) -> bool:
    """Whether every second element of a buffer of offsets does what the same offsets side by side do."""
    inputs, packing = make_inputs(name, "packed-S37-C40", torch.float32, "cpu")
    bounds = packing["cu_seqlens"]
    strided = torch.stack((bounds, torch.full_like(bounds, 17)), 1).flatten()[::2]
    assert strided.stride() == (2,)

    def run(offsets: Tensor) -> list[Tensor]:
        return with_grads(lambda *t: OPS[name][0](*t, cu_seqlens=offsets, provider="triton"), inputs)

    return all(torch.equal(a, b) for a, b in zip(run(strided), run(bounds), strict=True))


@pytest.mark.parametrize("name", sorted(PACKED_OPS))
def test_offsets_may_be_strided(run_interpreted, name):
    assert run_interpreted(strided_offsets, name)


def large_values() -> tuple[float, float, bool]:
    """Errors of gelu and of its slope where exp would overflow, and of adaLN where one-pass variance would cancel."""
    x = torch.tensor([-3e4, -300.0, -40.0, -12.0, -6.0, 6.0, 12.0, 40.0, 300.0, 3e4])
    y, dx, _ = with_grads(lambda *t: bias_gelu(*t, provider="triton"), [x.unsqueeze(0), torch.zeros_like(x)])
    want = with_grads(eager("gelu", None), [x.double().unsqueeze(0), torch.zeros_like(x, dtype=torch.float64)])
    far = 1000 + torch.randn(1, 2, 40)
    row = torch.zeros(1, 40)
    got = adaln_modulate(far, row, row, provider="triton")
    gelu_is_right = torch.allclose(y.double(), want[0], rtol=1e-5, atol=1e-9) and bool(y.isfinite().all())
    return relative_error(dx, want[1]), relative_error(got, F.layer_norm(far.double(), (40,), eps=1e-6)), gelu_is_right


def eps_errors(eps: float) -> list[float]:
    """Errors of adaLN alone and after a gated residual, of rows whose variance eps is not small beside."""
    torch.manual_seed(0)
    x, y, gate, shift, scale = (torch.randn(shape) for shape in [(2, 3, 40)] * 2 + [(2, 40)] * 3)

    def definition(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (40,), eps=eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def fused_definition(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        z = x + gate.unsqueeze(1) * y
        return z, definition(z, shift, scale)

    pairs = []
    for op, by_hand, given in (
        (adaln_modulate, definition, [0.3 * x, shift, scale]),
        (gated_residual_adaln, fused_definition, [0.3 * x, 0.3 * y, gate, shift, scale]),
    ):
        want = with_grads(by_hand, [t.double() for t in given])
        for provider in ("torch", "triton"):
            got = with_grads(lambda *t, op=op, p=provider: op(*t, eps=eps, provider=p), given)
            pairs += [relative_error(a, b) for a, b in zip(got, want, strict=True)]
    return pairs


@pytest.mark.parametrize("eps", [0.1, 0.0])
def test_eps_is_the_one_that_was_given(run_interpreted, eps):
    assert max(run_interpreted(eps_errors, eps)) < 1e-6


def test_large_values(run_interpreted):
    slope, normed, gelu_is_right = run_interpreted(large_values)
    assert slope < 1e-6 and gelu_is_right
    # One ulp of 1000 against a spread of 1.
    assert normed < 2e-4


def far_values(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """gelu and its slope at values far beyond those that a network has, and with NaN."""
    x = torch.tensor([-math.inf, -3e38, -1e30, -1e15, -1e12, -1e4, 1e4, 1e12, 1e20, 1e30, math.nan]).to(device, dtype)
    x.requires_grad_()
    y = bias_gelu(x.unsqueeze(0), torch.zeros(11, dtype=dtype, device=device), provider="triton")[0]
    return [t.detach().float().cpu() for t in (x, y, *torch.autograd.grad(y.sum(), x))]


def is_far_gelu(x: Tensor, y: Tensor, slope: Tensor) -> None:
    assert y[:6].abs().max() < 1e-30 and slope[:6].abs().max() < 1e-30
    assert torch.equal(y[6:-1], x[6:-1]) and torch.equal(slope[6:-1], torch.ones(4))
    assert y[-1].isnan() and slope[-1].isnan()


def test_gelu_of_far_values_is_zero_or_the_value(run_interpreted):
    is_far_gelu(*run_interpreted(far_values, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_on_the_gpu_errs_as_eager_does(name, shape, dtype):
    for min_programs in (1, 1056):
        within_the_bar(errors(name, shape, dtype, min_programs, "cuda"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_gpu_gelu_of_far_values_is_zero_or_the_value(dtype):
    is_far_gelu(*far_values(dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_on_the_gpu_two_runs_are_equal_bit_for_bit(name):
    torch.manual_seed(0)
    sizes = {"x": (2, 30_011, 1152), "r": (2, 1152), "b": (1152,)}
    inputs = [torch.randn(sizes[kind], device="cuda").bfloat16() for kind in OPS[name][1]]
    runs = [with_grads(lambda *t: OPS[name][0](*t, provider="triton"), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_on_the_gpu_offsets_pass_31_bits(name):
    """2^31 elements and 3 rows more: the last rows are right, forward and backward."""
    width, batch = (4608, 1)
    rows = 2**31 // width + 3
    sizes = {"x": (batch, rows, width), "r": (batch, width), "b": (width,)}
    torch.manual_seed(0)
    inputs = [torch.randn(sizes[kind], device="cuda", dtype=torch.bfloat16) for kind in OPS[name][1]]
    leaves = [t.requires_grad_() for t in inputs]
    outs = OPS[name][0](*leaves, provider="triton")
    outs = (outs,) if isinstance(outs, Tensor) else outs
    grads = torch.autograd.grad(outs, leaves[:1], [o.detach() for o in outs])
    tail = [t[:, -5:].double() if t.dim() == 3 else t.double() for t in (i.detach() for i in inputs)]
    tail_leaf = tail[0].requires_grad_()
    want = eager(name, None)(tail_leaf, *tail[1:])
    want = (want,) if isinstance(want, Tensor) else want
    dwant = torch.autograd.grad(want, tail_leaf, [o.detach()[:, -5:].double() for o in outs])
    for a, b in zip((*outs, *grads), (*want, *dwant), strict=True):
        assert relative_error(a.detach()[:, -5:], b.detach()) < 0.01
