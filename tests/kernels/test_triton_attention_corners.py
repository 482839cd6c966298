"""The Triton attention kernels, interpreted, where a grid of shapes does not look.

NaN and infinities, empty sequences, rows far apart, offsets that are not side by side, gradients of one output alone.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from longreel.kernels import attention, attention_packed
from longreel.kernels.attention import attention_op, attention_packed_op
from longreel.kernels.numerics import relative_error

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16]
PROVIDERS = ["triton", "triton-atomic"]


def _load_cases() -> Any:
    """attention_cases.py beside this file, which no path leads to."""
    spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).with_name("attention_cases.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _load_cases()


def check_far_below_zero(dtype: torch.dtype, provider: str) -> None:
    inputs = cases.make((20, 37, 37), 1, 1, 8, dtype)
    # Every score far below zero: exp(-lse) is more than the dtype holds, for keys that are not there too.
    far = 8.0 if dtype == torch.float32 else 4.0
    inputs = [(t.detach() + shift).requires_grad_() for t, shift in zip(inputs, (far, -far, 0.0), strict=True)]
    with cases.conditions(cases.SMALL):
        got = cases.results(lambda *x: attention(*x, softmax_scale=0.3, provider=provider), inputs)
    exact = cases.results(lambda *x: cases.definition(*x, 0.3), [t.detach().double().requires_grad_() for t in inputs])
    again = cases.results(lambda *x: attention(*x, softmax_scale=0.3, provider="torch"), inputs)
    assert exact[1].min() < (-89.0 if dtype == torch.float32 else -12.0)
    largest = exact[1].abs().max().item() if dtype == torch.float32 else 1.0
    cases.hold_to_the_bar(got, again, exact, dtype, largest_score=largest)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_below_zero_with_a_ragged_tile_of_keys(run_interpreted, dtype, provider):
    run_interpreted(check_far_below_zero, dtype, provider)


def check_minus_infinity(keys: str, provider: str) -> None:
    """Scores that overflow to -inf: of the first tile of keys, or of all, which are rows without keys then."""
    inputs = [t.detach() for t in cases.make((20, 37, 37), 1, 1, 8, torch.float32)]
    q, k, v = inputs[0].abs() * 1e20, inputs[1] * 1e-20, inputs[2]
    k[:, : 16 if keys == "first" else 37] = -1e20
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with cases.conditions(cases.SMALL):
        got = cases.results(lambda *x: attention(*x, softmax_scale=0.3, provider=provider), leaves)
    if keys == "all":
        assert not any(t.any() for t in (got[0], *got[2:])) and torch.isneginf(got[1]).all()
        return
    eager = cases.results(lambda *x: attention(*x, softmax_scale=0.3, provider="torch"), leaves)
    exact = cases.results(lambda *x: cases.definition(*x, 0.3), [t.detach().double().requires_grad_() for t in leaves])
    cases.hold_to_the_bar(got, eager, exact, torch.float32)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("keys", ["first", "all"])
def test_scores_of_minus_infinity_weigh_nothing(run_interpreted, keys, provider):
    run_interpreted(check_minus_infinity, keys, provider)


def packed_results(qkv: Tensor, offsets: Tensor, provider: str) -> list[Tensor]:
    with cases.conditions(cases.SMALL):
        return cases.results(lambda x: attention_packed(x, cu_seqlens=offsets, provider=provider), [qkv])


def check_strided_offsets(provider: str) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(1, 37, 3, 2, 8, requires_grad=True)
    offsets = torch.tensor([0, 3, 3, 20, 37])
    # Every second element of a buffer, the others of which are offsets too, but wrong ones.
    strided = torch.stack((offsets, torch.full_like(offsets, 30)), 1).flatten()[::2]
    assert strided.stride() == (2,)
    both = (packed_results(qkv, cu, provider) for cu in (strided, offsets))
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_offsets_may_be_strided(run_interpreted, provider):
    run_interpreted(check_strided_offsets, provider)


def check_isolation(value: float, provider: str) -> None:
    """Infinite or NaN tokens of one packed sequence change nothing in those before and after it."""
    torch.manual_seed(0)
    clean = torch.randn(1, 37, 3, 2, 8)
    dirty = clean.clone()
    dirty[:, 5:23] = value
    offsets = torch.tensor([0, 5, 23, 37])
    want = packed_results(clean.requires_grad_(), offsets, provider)
    got = packed_results(dirty.requires_grad_(), offsets, provider)
    assert not got[0][:, 5:23].isfinite().any()
    for name, a, b in zip(("out", "lse", "dqkv"), got, want, strict=True):
        others = [
            t[..., [*range(5), *range(23, 37)]] if name == "lse" else torch.cat((t[:, :5], t[:, 23:]), 1)
            for t in (a, b)
        ]
        assert torch.equal(*others), name


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_packed_sequences_do_not_touch_each_other(run_interpreted, value, provider):
    run_interpreted(check_isolation, value, provider)


def check_partial_gradients() -> None:
    q, k, v = cases.make((9, 7, 7), 2, 1, 16, torch.float32)
    with cases.conditions(cases.SMALL):
        out, lse = attention(q, k, v, softmax_scale=0.3, provider="triton")
        # A gradient expanded from one element, and none of the lse; then the lse alone.
        got = [torch.autograd.grad(y.sum(), (q, k, v), retain_graph=True) for y in (out, lse)]
    want_out, want_lse = cases.definition(*(t.double() for t in (q, k, v)), 0.3)
    want = [torch.autograd.grad(y.sum(), (q, k, v), retain_graph=True, allow_unused=True) for y in (want_out, want_lse)]
    for a, b in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
        assert (a - (0.0 if b is None else b)).abs().max() < 1e-5


def test_gradient_of_one_output_alone(run_interpreted):
    run_interpreted(check_partial_gradients)


def check_row_sum() -> None:
    q, k, _ = (t.detach() for t in cases.make((16, 16, 16), 1, 1, 16, torch.float16))
    _, lse = attention(q, k, k, softmax_scale=0.5, provider="triton")
    scores = torch.einsum("bshd,bthd->bhst", q.double(), k.double()) * 0.5
    top = scores.amax(-1, keepdim=True)
    rounded = ((scores - top).exp().half().double().sum(-1)).log() + top.squeeze(-1)
    unrounded = scores.logsumexp(-1)
    assert (lse - rounded).abs().mean() < 0.1 * (lse - unrounded).abs().mean()


def test_row_sum_adds_the_rounded_probabilities(run_interpreted):
    run_interpreted(check_row_sum)


def check_nan() -> None:
    q, k, v = (t.detach() for t in cases.make((20, 35, 35), 1, 1, 72, torch.float32))
    clean = attention(q, k, v, provider="triton")
    q[0, 3] = math.nan
    with cases.conditions(cases.SMALL):
        out, lse = attention(q, k, v, provider="triton")
    assert out[0, 3].isnan().all()
    assert lse[0, 0, 3].isnan()
    others = [i for i in range(20) if i != 3]
    assert relative_error(out[:, others], clean[0][:, others]) < 1e-6
    assert relative_error(lse[..., others], clean[1][..., others]) < 1e-6


def test_nan_in_a_query_stays_in_its_row(run_interpreted):
    run_interpreted(check_nan)


def check_empty() -> None:
    with cases.conditions(None):
        q, k, v = cases.make((4, 0, 0), 2, 2, 8, torch.float32)
        out, lse = attention(q, k, v, provider="triton")
        assert not out.any()
        assert torch.isneginf(lse).all()
        (out.sum() + lse.sum()).backward()
        assert not q.grad.any()
        assert k.grad.shape == k.shape
        q, k, v = cases.make((0, 5, 5), 2, 2, 8, torch.float32)
        out, lse = attention(q, k, v, provider="triton")
        assert out.shape == q.shape
        (out.sum() + lse.sum()).backward()
        # No query looked at these keys.
        assert not k.grad.any()
        assert not v.grad.any()
        empty = torch.zeros(3, dtype=torch.int64)
        q, k, v = cases.make((0, 0, 0), 1, 1, 8, torch.float32)
        attention(q, k, v, cu_seqlens_q=empty, cu_seqlens_k=empty, provider="triton")[0].sum().backward()


def test_empty_sequences(run_interpreted):
    run_interpreted(check_empty)


def check_far_rows(provider: str) -> None:
    # Nothing is written between the rows, so that the system gives no memory for what lies there.
    torch.manual_seed(0)
    step = 2**30 + 2**29
    buffers = [torch.empty(2 * step + 8, dtype=torch.float16) for _ in range(2)]
    rows = [b.as_strided((1, 3, 1, 8), (0, step, 8, 1)) for b in buffers]
    for r in rows:
        r.copy_(torch.randn(r.shape))
    q, k = rows
    near = [r.clone(memory_format=torch.contiguous_format) for r in rows]
    grads = []
    for a, b in ((q, k), near):
        out, lse = attention_op(a, b, b, 0.3, None, None, provider)
        back = torch.ops.longreel.attention_backward(out, lse, a, b, b, out, lse, 0.3, None, None, provider)
        grads.append([out, lse, *back])
    for far, here in zip(*grads, strict=True):
        assert torch.equal(far, here)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rows_beyond_two_to_the_31_elements(run_interpreted, provider):
    run_interpreted(check_far_rows, provider)


def check_far_results(atomic: bool) -> None:
    """What is written, and what backward reads of it, has rows as far apart as check_far_rows' inputs."""
    from longreel.kernels.triton_attention import backward_into
    from longreel.kernels.triton_attention_plan import plan_forward

    torch.manual_seed(0)
    step = 2**30 + 2**29

    def far() -> Tensor:
        return torch.empty(2 * step + 8, dtype=torch.float16).as_strided((1, 3, 1, 8), (0, step, 8, 1))

    qkv = [torch.randn(1, 3, 1, 8).half() for _ in range(3)]
    upstream = torch.randn(1, 3, 1, 8).half()
    results = []
    for make in (far, lambda: torch.empty(1, 3, 1, 8, dtype=torch.float16)):
        out, dout, *grads = (make() for _ in range(5))
        dout.copy_(upstream)
        lse = torch.empty(1, 1, 3)
        plan_forward(*qkv, out, lse, 0.3, None, None).run()
        backward_into(grads, dout, None, qkv, out, lse, 0.3, None, None, atomic=atomic)
        results.append([out, lse, *grads])
    for there, here in zip(*results, strict=True):
        assert torch.equal(there, here) and here.isfinite().all()


@pytest.mark.parametrize("atomic", [False, True], ids=["deterministic", "atomic"])
def test_results_beyond_two_to_the_31_elements(run_interpreted, atomic):
    run_interpreted(check_far_results, atomic)


def check_largest_scale(provider: str) -> None:
    from longreel.kernels.attention import MAX_SCALE

    q, k, v = (t.detach() for t in cases.make((20, 37, 37), 1, 1, 8, torch.float32))
    for scale in (MAX_SCALE, -MAX_SCALE):
        with cases.conditions(cases.SMALL):
            out, lse = attention(q, k, v, softmax_scale=scale, provider=provider)
        # One key has all the weight.
        want_out, want_lse = cases.definition(q.double(), k.double(), v.double(), scale)
        assert relative_error(out, want_out) < 1e-6 and relative_error(lse, want_lse) < 1e-6


def test_largest_scale(run_interpreted):
    run_interpreted(check_largest_scale, "triton")


def check_op() -> None:
    tensors = cases.make((5, 3, 3), 2, 1, 8, torch.float32)
    opcheck(attention_op, (*tensors, 0.3, None, None, "triton"))
    qkv = torch.randn(1, 6, 3, 1, 8, requires_grad=True)
    opcheck(attention_packed_op, (qkv, 0.3, torch.tensor([0, 2, 6]), "triton"))
    compiled = torch.compile(lambda *x: attention(*x, provider="triton"), backend="aot_eager", fullgraph=True)
    eager = cases.results(lambda *x: attention(*x, provider="triton"), tensors)
    for a, b in zip(cases.results(compiled, tensors), eager, strict=True):
        assert torch.equal(a, b)


def test_ops_pass_opcheck_and_compile_without_graph_breaks(run_interpreted):
    run_interpreted(check_op)


def check_refused() -> None:
    q, k, v = cases.make((3, 3, 3), 1, 1, 8, torch.float64)
    with pytest.raises(ValueError, match=r"q has dtype torch.float64; provider 'triton' computes in torch.bfloat16, "):
        attention(q, k, v, provider="triton")
    with pytest.raises(ValueError, match=r"qkv has dtype torch\.float64"):
        attention_packed(torch.stack((q, k, v), 2), provider="triton")
    with pytest.raises(ValueError, match=r"q has dtype torch\.float64"):
        attention_op(q, k, v, 0.3, None, None, "triton")


def test_fp64_is_refused(run_interpreted):
    run_interpreted(check_refused)


def test_cpu_without_interpreter_is_refused_with_the_reason():
    q, k, v = cases.make((3, 3, 3), 1, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="needs a CUDA device, got tensors on cpu; set TRITON_INTERPRET=1"):
        attention(q, k, v, provider="triton")
