"""Attention over batches padded to one length, against each sample by itself: by every provider that runs here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longreel.kernels import attention
from longreel.kernels.numerics import relative_error
from longreel.kernels.padding import end_to_end

LENGTHS = [5, 0, 7, 1]


def inputs(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, n, 2, 16, dtype=dtype) for n in (6, 7, 7)]


def with_grads(fn, tensors: list[Tensor]) -> list[Tensor]:
    """out, lse and the gradients of a functional of both, to which rows without keys give nothing."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, lse = fn(*leaves)
    torch.manual_seed(1)
    weights = [torch.randn(t.shape, dtype=t.dtype) for t in (out, lse)]
    loss = (out * weights[0]).sum() + (lse * weights[1])[lse.detach() > -math.inf].sum()
    return [out.detach(), lse.detach().masked_fill(lse == -math.inf, -1e3), *torch.autograd.grad(loss, leaves)]


def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    parts = [
        attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], provider="torch") for b, n in enumerate(LENGTHS)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def padded_errors(provider: str, dtype: torch.dtype) -> list[float]:
    def padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, kv_lengths=torch.tensor(LENGTHS), provider=provider)

    clean = inputs(dtype)
    dirty = [t.clone() for t in clean]
    for t in dirty[1:]:
        for b, n in enumerate(LENGTHS):
            t[b, n:] = math.nan
    got, want = with_grads(padded, dirty), with_grads(one_by_one, clean)
    assert [t.shape for t in got] == [t.shape for t in want]
    for grad in got[3:]:
        assert all(not grad[b, n:].any() for b, n in enumerate(LENGTHS))
    return [relative_error(a, b) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize(("provider", "dtype"), [("torch", torch.float64), ("sdpa-flash", torch.float32)])
def test_padded_batch_equals_its_samples(provider, dtype):
    assert max(padded_errors(provider, dtype)) < (1e-13 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("provider", ["triton", "triton-atomic"])
def test_padded_batch_equals_its_samples_by_triton(run_interpreted, provider):
    pytest.importorskip("triton")
    assert max(run_interpreted(padded_errors, provider, torch.float32)) < 1e-5


def test_nothing_is_copied():
    q, k, v = inputs(torch.float32)
    qkv = torch.randn(4, 7, 3, 2, 16)
    assert all(end_to_end(x).data_ptr() == x.data_ptr() for x in (q, k, v, *qkv.unbind(2)))


@pytest.mark.parametrize(("batch", "q_len", "k_len"), [(0, 6, 7), (4, 0, 7), (4, 6, 0)])
def test_empty_sides(batch, q_len, k_len):
    q, k, v = (torch.randn(batch, n, 2, 16, requires_grad=True) for n in (q_len, k_len, k_len))
    out, lse = attention(q, k, v, kv_lengths=torch.zeros(batch, dtype=torch.int64))
    assert out.shape == q.shape and list(lse.shape) == [batch, 2, q_len]
    assert not out.any() and (lse == -math.inf).all()
    assert not any(t.any() for t in torch.autograd.grad(out.sum(), (q, k, v)))


def test_samples_that_do_not_lie_end_to_end():
    q, k, v = (torch.randn(8, 7, 2, 16, dtype=torch.float64)[::2] for _ in range(3))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    got, want = attention(q, k, v, kv_lengths=lengths), one_by_one(q, k, v)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a == -math.inf, b == -math.inf)
        assert relative_error(*(t.masked_fill(t == -math.inf, 0.0) for t in (a, b))) < 1e-13


def test_compiles_without_graph_breaks_and_checks_when_it_runs():
    def padded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, kv_lengths=lengths)

    compiled = torch.compile(padded, backend="aot_eager", fullgraph=True)
    tensors = inputs(torch.float32)
    right = torch.tensor(LENGTHS)
    for a, b in zip(compiled(*tensors, right), padded(*tensors, right), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="kv_lengths must be 0 to 7"):
        compiled(*tensors, torch.tensor([5, 8, 7, 1]))


@pytest.mark.parametrize(
    ("lengths", "error", "says"),
    [
        ([5, 0, 7, 1], TypeError, r"kv_lengths must be an int32 or int64 tensor \[B\], got list \[5, 0, 7, 1\]"),
        (torch.tensor([5, 0, 7]), ValueError, r"kv_lengths must be int32 or int64 \[4\] .* got torch.int64 \[3\]"),
        (torch.tensor([5.0, 0, 7, 1]), ValueError, r"kv_lengths must be .* got torch.float32 \[4\]"),
        (torch.tensor([5, 0, 7, 1], device="meta"), ValueError, "kv_lengths is on meta, q on cpu"),
        (torch.tensor([5, 0, 8, 1]), ValueError, "kv_lengths must be 0 to 7"),
        (torch.tensor([5, -1, 7, 1]), ValueError, "kv_lengths must be 0 to 7"),
        (torch.tensor([5, 0, 7, 8]), ValueError, "kv_lengths must be 0 to 7"),
    ],
)
def test_wrong_lengths_are_named(lengths, error, says):
    with pytest.raises(error, match=says):
        attention(*inputs(torch.float32), kv_lengths=lengths)


def test_padded_and_packed_exclude_each_other():
    q, k, v = (t[:1] for t in inputs(torch.float32))
    cu = {"cu_seqlens_q": torch.tensor([0, 6]), "cu_seqlens_k": torch.tensor([0, 7])}
    with pytest.raises(ValueError, match="give one or the other"):
        attention(q, k, v, kv_lengths=torch.tensor([3]), **cu)


@pytest.mark.gpu
def test_gpu_padded_batch_equals_its_samples_and_lengths_are_read_once():
    tensors = [t.cuda() for t in inputs(torch.float32)]
    lengths = torch.tensor(LENGTHS, device="cuda")
    got = attention(*tensors, kv_lengths=lengths, provider="triton")
    for a, b in zip(got, one_by_one(*tensors), strict=True):
        assert relative_error(*(t.masked_fill(t == -math.inf, 0.0) for t in (a, b))) < 1e-5
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(*tensors, kv_lengths=lengths, provider="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
