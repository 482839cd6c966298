"""longreel.kernels.lse_merge: against attention over all keys at once, -inf on either or both sides, Triton too."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from longreel.kernels import attention, merge_attention
from longreel.kernels.numerics import KERNEL_ERROR_FACTOR, relative_error

INF = float("inf")


def partials(
    batch: int, seq_len: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> list[Tensor]:
    """out1, lse1, out2, lse2: -inf on both sides at query 0, on the first at query 1, on the second at query 2."""
    torch.manual_seed(0)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    out1, out2 = (torch.randn(batch, seq_len, heads, head_dim).to(dtype) for _ in range(2))
    lse1, lse2 = (4 * torch.randn(batch, heads, seq_len).to(compute) for _ in range(2))
    lse1[:, :, :2] = -INF
    lse2[:, :, :1] = lse2[:, :, 2:3] = -INF
    return [t.to(device) for t in (out1, lse1, out2, lse2)]


def naive(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """By exponentials, in fp64, where that is exact enough; -inf on both sides stays out of the division."""
    e1, e2 = lse1.exp(), lse2.exp()
    total = e1 + e2
    w1, w2 = (torch.where(total > 0, e / total.clamp_min(1e-300), 0.0).transpose(1, 2).unsqueeze(-1) for e in (e1, e2))
    return w1 * out1 + w2 * out2, torch.where(total > 0, total.clamp_min(1e-300).log(), -INF)


def with_grads(fn: Any, inputs: list[Tensor]) -> list[Tensor]:
    """out, lse and the gradients of the four inputs, both outputs having one."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out, lse = fn(*leaves)
    torch.manual_seed(1)
    upstream = [torch.randn(t.shape, dtype=torch.float32).to(t) for t in (out, lse)]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, upstream)]


@pytest.mark.usefixtures("poisoned_empty")
def test_halves_of_the_keys_merge_to_attention_over_all():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 8, dtype=torch.float64, requires_grad=True) for length in (5, 7, 7))

    def halves(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return merge_attention(*attention(q, k[:, :3], v[:, :3]), *attention(q, k[:, 3:], v[:, 3:]))

    for a, b in zip(with_grads(halves, [q, k, v]), with_grads(attention, [q, k, v]), strict=True):
        assert relative_error(a, b) < 1e-13


def test_side_without_keys_changes_nothing():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 2, 8, dtype=torch.float64) for _ in range(3))
    whole, none = attention(q, k, v), attention(q, k[:, :0], v[:, :0])
    for merged in (merge_attention(*whole, *none), merge_attention(*none, *whole)):
        assert torch.equal(merged[0], whole[0]) and torch.equal(merged[1], whole[1])
    out, lse = merge_attention(*none, *none)
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, torch.full_like(lse, -INF))


@pytest.mark.usefixtures("poisoned_empty")
def test_gradients_with_rows_of_minus_infinity():
    inputs = partials(2, 5, 3, 8)
    got = with_grads(merge_attention, inputs)
    # Fills what an lse of -inf makes undefined before the fp64 definition sees it, as its gradient is 0 by contract.
    empty = [t == -INF for t in (inputs[1], inputs[3])]

    def masked(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = naive(out1, lse1.masked_fill(empty[0], -INF), out2, lse2.masked_fill(empty[1], -INF))
        return out, lse.masked_fill(empty[0] & empty[1], 0.0)

    want = with_grads(masked, [t.masked_fill(t == -INF, 0.0) for t in inputs])
    want[1] = want[1].masked_fill(empty[0] & empty[1], -INF)
    assert torch.equal(got[1] == -INF, want[1] == -INF)
    got[1], want[1] = (t.masked_fill(t == -INF, 0.0) for t in (got[1], want[1]))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-13


def test_gradcheck_with_rows_of_minus_infinity():
    inputs = partials(1, 4, 2, 8)
    empty = [t == -INF for t in (inputs[1], inputs[3])]

    def finite(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = merge_attention(out1, lse1.masked_fill(empty[0], -INF), out2, lse2.masked_fill(empty[1], -INF))
        return out, lse.masked_fill(empty[0] & empty[1], 0.0)

    assert torch.autograd.gradcheck(finite, [t.masked_fill(t == -INF, 0.0).requires_grad_() for t in inputs])


def test_far_apart_lses_neither_overflow_nor_lose_the_smaller_gradient():
    out1, lse1, out2, lse2 = partials(1, 4, 1, 8)
    lse1, lse2 = torch.full_like(lse1, 2000.0), torch.full_like(lse2, 1500.0)
    out, lse = merge_attention(out1, lse1, out2, lse2)
    assert torch.equal(out, out1) and torch.equal(lse, lse1)
    lse2 = torch.full_like(lse2, 1970.0)
    grad = with_grads(merge_attention, [out1, lse1, out2, lse2])[4]
    torch.manual_seed(1)
    dout = torch.randn(out1.shape, dtype=torch.float32).double()
    assert relative_error(grad, dout / (1 + torch.tensor(30.0, dtype=torch.float64).exp())) < 1e-13


def small_sides(provider: str, dtype: torch.dtype) -> float:
    """Largest error of the merge of lses 9 to 16 apart, the larger of which is near 0."""
    gap = torch.linspace(9.0, 16.0, 36, dtype=dtype)
    large = torch.linspace(-1e-5, 1e-5, 36, dtype=dtype)
    out = torch.zeros(1, 36, 1, 8, dtype=dtype)
    lses = large.view(1, 1, -1), (large - gap).view(1, 1, -1)
    want = torch.logaddexp(*(t.double() for t in lses))
    worst = 0.0
    for sides in (lses, lses[::-1]):
        lse = merge_attention(out, sides[0], out, sides[1], provider=provider)[1].double()
        worst = max(worst, (lse - want).abs().max().item())
    return worst


def test_what_a_far_smaller_side_adds_to_an_lse_near_zero_is_exact():
    # It adds 1e-4 to 1e-7, of which log(1 + it) would lose up to half an ulp of 1, 6e-8.
    assert small_sides("torch", torch.float32) < 1e-10 and small_sides("torch", torch.float64) < 1e-16


def test_what_a_far_smaller_side_adds_is_exact_by_triton(run_interpreted):
    assert run_interpreted(small_sides, "triton", torch.float32) < 1e-8


def test_whatever_lies_where_no_key_was_seen_is_not_read():
    out1, lse1, out2, lse2 = partials(1, 4, 2, 8)
    clean = with_grads(merge_attention, [out1, lse1, out2, lse2])
    dirty_out = out1.clone()
    dirty_out[:, :2] = float("nan")
    for a, b in zip(with_grads(merge_attention, [dirty_out, lse1, out2, lse2]), clean, strict=True):
        assert torch.equal(a, b)


def test_compiles_without_graph_breaks():
    leaves = [t.requires_grad_() for t in (torch.randn_like(t) for t in partials(2, 3, 2, 8))]
    compiled = torch.compile(merge_attention, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(*leaves), merge_attention(*leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({0: torch.zeros(3, 2, 8)}, r"out1 must be \[B, S, H, D\]"),
        ({2: torch.zeros(1, 3, 2, 8)}, "out2 has dtype torch.float32, out1 has torch.float64"),
        ({2: torch.zeros(1, 4, 2, 8).double()}, r"out2 \[1, 4, 2, 8\] must have out1's shape \[1, 3, 2, 8\]"),
        ({1: torch.zeros(1, 3, 2).double()}, r"lse1 must be \[1, 2, 3\] in torch.float64 .* got \[1, 3, 2\]"),
        ({3: torch.zeros(1, 2, 3)}, r"lse2 must be .* got \[1, 2, 3\] in torch.float32"),
    ],
)
def test_bad_input_is_named(change, says):
    inputs = partials(1, 3, 2, 8)
    for index, value in change.items():
        inputs[index] = value
    with pytest.raises(ValueError, match=says):
        merge_attention(*inputs)


def triton_errors(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> list[tuple[float, float]]:
    """(error of Triton, error of the eager specification) against fp64, for out, lse and the four gradients."""
    inputs = partials(*shape, dtype=dtype, device=device)
    with pytest.MonkeyPatch.context() as patch:
        real = torch.empty_like
        patch.setattr(torch, "empty_like", lambda *a, **k: real(*a, **k).fill_(float("nan")))
        got = with_grads(lambda *t: merge_attention(*t, provider="triton"), inputs)
    eager = with_grads(lambda *t: merge_attention(*t, provider="torch"), inputs)
    want = with_grads(merge_attention, [t.double() for t in inputs])
    assert [t.dtype for t in got] == [t.dtype for t in eager]
    assert torch.equal(got[1] == -INF, want[1] == -INF)
    for each in (got, eager, want):
        each[1] = each[1].masked_fill(each[1] == -INF, 0.0)
    return [(relative_error(a, w), relative_error(e, w)) for a, e, w in zip(got, eager, want, strict=True)]


SHAPES = [(2, 21, 3, 72), (1, 65, 2, 40), (1, 1, 1, 8), (3, 3, 5, 64), (1, 3, 1, 96), (2, 1, 2, 128)]
SHAPE_IDS = [f"B{b}-S{s}-H{h}-D{d}" for b, s, h, d in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_triton_errs_as_eager_does(run_interpreted, shape, dtype):
    for got, eager in run_interpreted(triton_errors, shape, dtype, "cpu"):
        assert got <= KERNEL_ERROR_FACTOR * eager + torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4099, 16, 72)], ids=[*SHAPE_IDS, "B2-S4099-H16-D72"])
def test_triton_on_the_gpu_errs_as_eager_does(shape, dtype):
    for got, eager in triton_errors(shape, dtype, "cuda"):
        assert got <= KERNEL_ERROR_FACTOR * eager + torch.finfo(dtype).eps


def triton_corners() -> None:
    """Empty sequences, an expanded gradient, a gradient of the lse alone, and NaN under an lse of -inf."""
    run = lambda *t: merge_attention(*t, provider="triton")  # noqa: E731
    empty = with_grads(run, partials(2, 0, 3, 8, torch.float32))
    assert [t.numel() for t in empty] == [0] * 6
    inputs = [t.requires_grad_() for t in partials(1, 4, 2, 8, torch.float32)]
    for pick in (0, 1):
        total = [fn(*inputs)[pick][..., 3:].sum() for fn in (run, merge_attention)]
        for a, b in zip(*(torch.autograd.grad(t, inputs, allow_unused=True) for t in total), strict=True):
            assert relative_error(a, b) < 1e-6
    out1, lse1, out2, lse2 = (t.detach() for t in inputs)
    # Heads before tokens in memory, as other attention kernels return them, and an lse laid out the other way.
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (out1, lse1, out2, lse2)]
    for a, b in zip(run(*turned), run(out1, lse1, out2, lse2), strict=True):
        assert torch.equal(a, b)
    dirty = out1.clone()
    dirty[:, :2] = float("nan")
    for a, b in zip(with_grads(run, [dirty, lse1, out2, lse2]), with_grads(run, [out1, lse1, out2, lse2]), strict=True):
        assert torch.equal(a, b)


def test_triton_corners(run_interpreted):
    run_interpreted(triton_corners)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_kernels_compile_for_hopper_without_spills(compile_kernel, backward):
    from longreel.kernels import triton_lse_merge as kernels

    half, full = torch.bfloat16, torch.float32
    options = kernels.row_options("merge_bwd" if backward else "merge_fwd", 819_200, 72)
    num_warps = options.pop("num_warps")
    pairs = {"out1": half, "lse1": full, "out2": half, "lse2": full}
    sizes = {"num_rows": 819200 * 16, "seq_len": 819200, "heads": 16}
    if backward:
        grads = {"dout": half, "dlse": full, "dout1": half, "dlse1": full, "dout2": half, "dlse2": full}
        compiled = compile_kernel(
            kernels.merge_attention_bwd_kernel, pairs | grads | sizes | options, num_warps=num_warps
        )
    else:
        arguments = pairs | {"out": half, "lse": full} | sizes | options
        compiled = compile_kernel(kernels.merge_attention_fwd_kernel, arguments, num_warps=num_warps)
    assert compiled.spills == compiled.local_bytes == 0
    assert "ld.global.v4.b32" in compiled.ptx and "st.global.v4.b32" in compiled.ptx
    assert compiled.programs_per_sm() >= 4
    assert not re.findall(r"arith\.muli .*: (?:tensor<[^>]*x)?i32", compiled.ttir)
