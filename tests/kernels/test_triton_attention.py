"""The Triton attention kernels, interpreted on the CPU, against the definition in fp64; and on a GPU (-m gpu).

fp32 and fp16 only under the interpreter: its bf16 tl.dot is wrong without an error.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from longreel.kernels import attention, attention_packed, reference
from longreel.kernels.attention import attention_op, attention_packed_op
from longreel.kernels.numerics import KERNEL_ERROR_FACTOR, relative_error

pytest.importorskip("triton")

NAMES = ("out", "lse", "dq", "dk", "dv")
DTYPES = [torch.float32, torch.float16]
# (block_m, block_n) that give several tiles, full and ragged, at short lengths; None is what a launch would use.
SMALL = (16, 16)


@contextlib.contextmanager
def conditions(tiles: tuple[int, int] | None) -> Iterator[None]:
    """Outputs start as NaN, and tiles have the given shape."""
    from longreel.kernels import triton_attention_tuning as tuning

    def poison(make):
        def made(*args, **options):
            tensor = make(*args, **options)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return made

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "empty_like", poison(torch.empty_like)))
        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty)))
        if tiles is not None:
            chosen = tuning.AttentionTiles(
                block_m=tiles[0], block_n=tiles[1], num_warps=4, num_stages=1, planned_programs=1
            )
            stack.enter_context(mock.patch.object(tuning, "attention_tiles", return_value=chosen))
        yield


def make(lengths: tuple[int, ...], batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, n, heads, head_dim).to(dtype).requires_grad_() for n in lengths]


def definition(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v), scores.logsumexp(-1)


def segments_of(fn, cu_q: list[int] | None, cu_k: list[int] | None):
    """fn on each packed segment that has rows on both sides; out 0 and lse -inf elsewhere."""
    if cu_q is None or cu_k is None:
        return fn

    def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for (a, b), (c, d) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
            if b > a and d > c:
                out, lse = fn(q[:, a:b], k[:, c:d], v[:, c:d])
            else:
                out = q[:, a:b] * 0
                lse = q.new_full((1, q.shape[2], b - a), -math.inf)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, 1), torch.cat(lses, 2)

    return packed


def results(fn, tensors: list[Tensor]) -> list[Tensor]:
    """out, lse, and gradients of a random functional of both; rows without keys take no part in it."""
    out, lse = fn(*tensors)
    torch.manual_seed(1)
    w_out, w_lse = torch.randn(out.shape).to(out.dtype), torch.randn(lse.shape).to(lse.dtype)
    loss = (out * w_out).sum() + (lse * w_lse)[lse.detach() > -math.inf].sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)]


def distance(value: Tensor, exact: Tensor) -> float:
    finite = exact > -math.inf
    return (value[finite].double() - exact[finite]).norm().item()


def hold_to_the_bar(
    got: list[Tensor], eager: list[Tensor], exact: list[Tensor], dtype: torch.dtype, names: tuple[str, ...] = NAMES
) -> None:
    for name, a, e, b in zip(names, got, eager, exact, strict=True):
        if name == "lse":
            assert torch.equal(a == -math.inf, b == -math.inf)
            a, e, b = (t.masked_fill(t == -math.inf, 0.0) for t in (a, e, b))
        # dq and dk of a single key are zero but for rounding: measure them against the size of dv.
        floor = torch.linalg.vector_norm(exact[-1].double()).item() if name.startswith("d") else 0.0
        allowed = KERNEL_ERROR_FACTOR * relative_error(e, b, floor) + 2 * torch.finfo(dtype).eps
        error = relative_error(a, b, floor)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check_dense(
    lengths: tuple[int, int],
    batch: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    tiles: tuple[int, int] | None,
    scale: float = 0.3,
    cu_q: list[int] | None = None,
    cu_k: list[int] | None = None,
    cu_dtype: torch.dtype = torch.int64,
    provider: str = "triton",
) -> None:
    inputs = make((lengths[0], lengths[1], lengths[1]), batch, heads, head_dim, dtype)
    offsets = {}
    if cu_q is not None:
        offsets = {f"cu_seqlens_{s}": torch.tensor(c, dtype=cu_dtype) for s, c in (("q", cu_q), ("k", cu_k))}
    with conditions(tiles):
        got = results(lambda *x: attention(*x, softmax_scale=scale, provider=provider, **offsets), inputs)
    wanted = segments_of(lambda *x: definition(*x, scale), cu_q, cu_k)
    exact = results(wanted, [t.detach().double().requires_grad_() for t in inputs])
    eager = results(wanted, inputs)
    if dtype == torch.float32:
        # The same computation, P recomputed from a rounded lse, in eager PyTorch: autograd keeps P, and at a single key
        # or at large scores its error is smaller than any recomputation's.
        again = results(lambda *x: attention(*x, softmax_scale=scale, provider="torch", **offsets), inputs)
        eager = [max(pair, key=lambda x: distance(x, b)) for *pair, b in zip(eager, again, exact, strict=True)]
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    hold_to_the_bar(got, eager, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128])
def test_outputs_and_gradients_equal_the_definition(run_interpreted, head_dim, dtype):
    # A full tile and a ragged one of queries, two and a ragged one of keys; batch and heads above one.
    run_interpreted(check_dense, (20, 37), 2, 2, head_dim, dtype, SMALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128])
def test_atomic_backward_equals_the_definition(run_interpreted, head_dim, dtype):
    run_interpreted(check_dense, (20, 37), 2, 2, head_dim, dtype, SMALL, 0.3, None, None, torch.int64, "triton-atomic")


def test_atomic_backward_of_packed_sequences(run_interpreted):
    cu_q = [0, 0, 17, 20, 20, 20, 36, 41, 41]
    cu_k = [0, 3, 36, 36, 40, 40, 41, 57, 57]
    run_interpreted(
        check_dense, (41, 57), 1, 2, 72, torch.float32, SMALL, 0.3, cu_q, cu_k, torch.int64, "triton-atomic"
    )


@pytest.mark.parametrize("lengths", [(1, 1), (1, 33), (33, 1), (16, 32)], ids=["S1-T1", "S1-T33", "S33-T1", "whole"])
def test_lengths_at_the_edges(run_interpreted, lengths):
    run_interpreted(check_dense, lengths, 2, 1, 72, torch.float32, SMALL)


@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_tiles_of_production(run_interpreted, head_dim):
    run_interpreted(check_dense, (130, 129), 1, 1, head_dim, torch.float16, None, head_dim**-0.5)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 40.0], ids=["negative", "zero", "sharp"])
def test_any_softmax_scale(run_interpreted, scale):
    run_interpreted(check_dense, (17, 21), 1, 1, 8, torch.float32, SMALL, scale)


def check_far_below_zero(dtype: torch.dtype, provider: str) -> None:
    inputs = make((20, 37, 37), 1, 1, 8, dtype)
    # Every score far below zero: exp(-lse) is more than the dtype holds, for keys that are not there too.
    far = 8.0 if dtype == torch.float32 else 4.0
    inputs = [(t.detach() + shift).requires_grad_() for t, shift in zip(inputs, (far, -far, 0.0), strict=True)]
    with conditions(SMALL):
        got = results(lambda *x: attention(*x, softmax_scale=0.3, provider=provider), inputs)
    exact = results(lambda *x: definition(*x, 0.3), [t.detach().double().requires_grad_() for t in inputs])
    again = results(lambda *x: attention(*x, softmax_scale=0.3, provider="torch"), inputs)
    assert exact[1].min() < (-89.0 if dtype == torch.float32 else -12.0)
    hold_to_the_bar(got, again, exact, dtype)


@pytest.mark.parametrize("provider", ["triton", "triton-atomic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_below_zero_with_a_ragged_tile_of_keys(run_interpreted, dtype, provider):
    run_interpreted(check_far_below_zero, dtype, provider)


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_sequences(run_interpreted, cu_dtype):
    # Empty segments at the start, in the middle (on either side, on both) and at the end; tiles that start anywhere.
    cu_q = [0, 0, 17, 20, 20, 20, 36, 41, 41]
    cu_k = [0, 3, 36, 36, 40, 40, 41, 57, 57]
    run_interpreted(check_dense, (41, 57), 1, 2, 72, torch.float32, SMALL, 0.3, cu_q, cu_k, cu_dtype)


def test_one_packed_segment_is_the_whole(run_interpreted):
    run_interpreted(check_dense, (18, 35), 1, 1, 8, torch.float32, SMALL, 0.3, [0, 18], [0, 35])


def check_packed_qkv(cu: list[int] | None, aligned: bool, provider: str = "triton") -> None:
    torch.manual_seed(0)
    # Rows of a wider buffer: strides that are not those of a contiguous tensor, nor multiples of 8 if not aligned.
    wide = torch.randn(1 if cu else 2, 31, 3, 2, 40 if aligned else 43)[:, 2:29, :, :, :40]
    qkv = wide.requires_grad_()
    offsets = None if cu is None else torch.tensor(cu)
    with conditions(SMALL):
        packed = results(lambda x: attention_packed(x, cu_seqlens=offsets, provider=provider), [qkv])
        cu_both = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        views = results(lambda x: attention(*x.unbind(2), provider=provider, **cu_both), [qkv])
    wanted = segments_of(lambda *x: definition(*x, 40**-0.5), cu, cu)
    exact = results(lambda x: wanted(*x.unbind(2)), [qkv.detach().double().requires_grad_()])
    eager = results(lambda x: wanted(*x.unbind(2)), [qkv])
    for got in (packed, views):
        hold_to_the_bar(got, eager, exact, torch.float32, ("out", "lse", "dqkv"))
    for a, b in zip(packed, views, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("aligned", [True, False], ids=["strides-of-8", "odd-strides"])
@pytest.mark.parametrize("cu", [None, [0, 5, 5, 27]], ids=["batch", "packed"])
def test_packed_qkv_and_strided_views(run_interpreted, cu, aligned):
    run_interpreted(check_packed_qkv, cu, aligned)


def test_packed_qkv_with_the_atomic_backward(run_interpreted):
    run_interpreted(check_packed_qkv, [0, 5, 5, 27], True, "triton-atomic")


def check_partial_gradients() -> None:
    q, k, v = make((9, 7, 7), 2, 1, 16, torch.float32)
    with conditions(SMALL):
        out, lse = attention(q, k, v, softmax_scale=0.3, provider="triton")
        # A gradient expanded from one element, and none of the lse; then the lse alone.
        got = [torch.autograd.grad(y.sum(), (q, k, v), retain_graph=True) for y in (out, lse)]
    want_out, want_lse = definition(*(t.double() for t in (q, k, v)), 0.3)
    want = [torch.autograd.grad(y.sum(), (q, k, v), retain_graph=True, allow_unused=True) for y in (want_out, want_lse)]
    for a, b in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
        assert (a - (0.0 if b is None else b)).abs().max() < 1e-5


def test_gradient_of_one_output_alone(run_interpreted):
    run_interpreted(check_partial_gradients)


def check_row_sum() -> None:
    q, k, _ = (t.detach() for t in make((16, 16, 16), 1, 1, 16, torch.float16))
    _, lse = attention(q, k, k, softmax_scale=0.5, provider="triton")
    scores = torch.einsum("bshd,bthd->bhst", q.double(), k.double()) * 0.5
    top = scores.amax(-1, keepdim=True)
    rounded = ((scores - top).exp().half().double().sum(-1)).log() + top.squeeze(-1)
    unrounded = scores.logsumexp(-1)
    assert (lse - rounded).abs().mean() < 0.1 * (lse - unrounded).abs().mean()


def test_row_sum_adds_the_rounded_probabilities(run_interpreted):
    run_interpreted(check_row_sum)


def check_nan() -> None:
    q, k, v = (t.detach() for t in make((20, 35, 35), 1, 1, 72, torch.float32))
    clean = attention(q, k, v, provider="triton")
    q[0, 3] = math.nan
    with conditions(SMALL):
        out, lse = attention(q, k, v, provider="triton")
    assert out[0, 3].isnan().all()
    assert lse[0, 0, 3].isnan()
    others = [i for i in range(20) if i != 3]
    assert relative_error(out[:, others], clean[0][:, others]) < 1e-6
    assert relative_error(lse[..., others], clean[1][..., others]) < 1e-6


def test_nan_in_a_query_stays_in_its_row(run_interpreted):
    run_interpreted(check_nan)


def check_empty() -> None:
    with conditions(None):
        q, k, v = make((4, 0, 0), 2, 2, 8, torch.float32)
        out, lse = attention(q, k, v, provider="triton")
        assert not out.any()
        assert torch.isneginf(lse).all()
        (out.sum() + lse.sum()).backward()
        assert not q.grad.any()
        assert k.grad.shape == k.shape
        q, k, v = make((0, 5, 5), 2, 2, 8, torch.float32)
        out, lse = attention(q, k, v, provider="triton")
        assert out.shape == q.shape
        (out.sum() + lse.sum()).backward()
        # No query looked at these keys.
        assert not k.grad.any()
        assert not v.grad.any()
        empty = torch.zeros(3, dtype=torch.int64)
        q, k, v = make((0, 0, 0), 1, 1, 8, torch.float32)
        attention(q, k, v, cu_seqlens_q=empty, cu_seqlens_k=empty, provider="triton")[0].sum().backward()


def test_empty_sequences(run_interpreted):
    run_interpreted(check_empty)


def check_far_rows() -> None:
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
        out, lse = attention_op(a, b, b, 0.3, None, None, "triton")
        back = torch.ops.longreel.attention_backward(out, lse, a, b, b, out, lse, 0.3, None, None, "triton")
        grads.append([out, lse, *back])
    for far, here in zip(*grads, strict=True):
        assert torch.equal(far, here)


def test_rows_beyond_two_to_the_31_elements(run_interpreted):
    run_interpreted(check_far_rows)


def check_op() -> None:
    tensors = make((5, 3, 3), 2, 1, 8, torch.float32)
    opcheck(attention_op, (*tensors, 0.3, None, None, "triton"))
    qkv = torch.randn(1, 6, 3, 1, 8, requires_grad=True)
    opcheck(attention_packed_op, (qkv, 0.3, torch.tensor([0, 2, 6]), "triton"))
    compiled = torch.compile(lambda *x: attention(*x, provider="triton"), backend="aot_eager", fullgraph=True)
    eager = results(lambda *x: attention(*x, provider="triton"), tensors)
    for a, b in zip(results(compiled, tensors), eager, strict=True):
        assert torch.equal(a, b)


def test_ops_pass_opcheck_and_compile_without_graph_breaks(run_interpreted):
    run_interpreted(check_op)


def check_refused() -> None:
    q, k, v = make((3, 3, 3), 1, 1, 8, torch.float64)
    with pytest.raises(ValueError, match=r"q has dtype torch.float64; provider 'triton' computes in torch.bfloat16, "):
        attention(q, k, v, provider="triton")
    with pytest.raises(ValueError, match=r"qkv has dtype torch\.float64"):
        attention_packed(torch.stack((q, k, v), 2), provider="triton")
    with pytest.raises(ValueError, match=r"q has dtype torch\.float64"):
        attention_op(q, k, v, 0.3, None, None, "triton")


def test_fp64_is_refused(run_interpreted):
    run_interpreted(check_refused)


def test_cpu_without_interpreter_is_refused_with_the_reason():
    q, k, v = make((3, 3, 3), 1, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="needs a CUDA device, got tensors on cpu; set TRITON_INTERPRET=1"):
        attention(q, k, v, provider="triton")


def cuda_inputs(lengths: tuple[int, ...], batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().cuda().requires_grad_() for t in make(lengths, batch, heads, head_dim, dtype)]


def cuda_results(
    provider: str, tensors: list[Tensor], dout_dtype: torch.dtype | None = None, **options
) -> list[Tensor]:
    out, lse = attention(*tensors, provider=provider, **options)
    torch.manual_seed(1)
    # An oracle of a wider dtype gets the gradient that the tested dtype got.
    w_out = torch.randn(out.shape, device=out.device).to(dout_dtype or out.dtype).to(out.dtype)
    w_lse = torch.randn(lse.shape, device=out.device).to(lse.dtype)
    loss = (out * w_out).sum() + (lse * w_lse)[lse.detach() > -math.inf].sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128])
@pytest.mark.parametrize("lengths", [(1, 1), (127, 129), (1000, 1537)], ids=["S1", "S127-T129", "S1000-T1537"])
def test_gpu_equals_the_definition(lengths, head_dim, dtype):
    tensors = cuda_inputs((lengths[0], lengths[1], lengths[1]), 2, 2, head_dim, dtype)
    got = cuda_results("triton", tensors, softmax_scale=0.2)
    wide = [t.detach().double().requires_grad_() for t in tensors]

    def by_hand(inputs: list[Tensor]) -> list[Tensor]:
        out, lse = definition(*inputs, 0.2)
        torch.manual_seed(1)
        w_out = torch.randn(out.shape, device="cuda").to(dtype).to(out.dtype)
        w_lse = torch.randn(lse.shape, device="cuda").to(lse.dtype)
        return [out.detach(), lse.detach(), *torch.autograd.grad((out * w_out).sum() + (lse * w_lse).sum(), inputs)]

    hold_to_the_bar(got, by_hand(tensors), by_hand(wide), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_gpu_long_sequences_match_sdpa_in_error(head_dim, dtype):
    tensors = cuda_inputs((16_383, 16_385, 16_385), 1, 2, head_dim, dtype)
    exact = cuda_results("torch", [t.detach().float().requires_grad_() for t in tensors], dtype)
    hold_to_the_bar(cuda_results("triton", tensors), cuda_results("sdpa-flash", tensors), exact, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_gpu_atomic_backward_matches_the_deterministic_one_in_error(head_dim):
    tensors = cuda_inputs((4_099, 4_097, 4_097), 1, 2, head_dim, torch.bfloat16)
    exact = cuda_results("torch", [t.detach().float().requires_grad_() for t in tensors], torch.bfloat16)
    hold_to_the_bar(cuda_results("triton-atomic", tensors), cuda_results("triton", tensors), exact, torch.bfloat16)


@pytest.mark.gpu
def test_gpu_packed_segments_match_separate_ones():
    bounds = [0, 0, 700, 701, 701, 3000]
    tensors = cuda_inputs((3000, 3000, 3000), 1, 2, 72, torch.bfloat16)
    offsets = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor(bounds, dtype=torch.int32, device="cuda"))
    exact = cuda_results("torch", [t.detach().float().requires_grad_() for t in tensors], torch.bfloat16, **offsets)
    eager = cuda_results("sdpa-flash", tensors, **offsets)
    hold_to_the_bar(cuda_results("triton", tensors, **offsets), eager, exact, torch.bfloat16)


@pytest.mark.gpu
def test_gpu_backward_is_deterministic():
    tensors = cuda_inputs((4097, 4097, 4097), 1, 4, 72, torch.bfloat16)
    first, *others = (cuda_results("triton", tensors) for _ in range(3))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_packed_projection_beyond_two_to_the_31_elements():
    # [819,200, 3456] has 2.8e9 elements; rows from both ends against the specification in fp32.
    torch.manual_seed(0)
    qkv = torch.randn(1, 819_200, 3, 16, 72, device="cuda", dtype=torch.bfloat16)
    out, lse = attention_packed(qkv, provider="triton")
    q, k, v = qkv.unbind(2)
    for rows in (slice(0, 4), slice(819_196, 819_200)):
        for head in (0, 15):
            pick = (slice(None), slice(None), slice(head, head + 1))
            exact = reference.attention_fwd(q[:, rows][pick].float(), k[pick], v[pick], 72**-0.5, None, None)
            assert relative_error(out[:, rows][pick], exact[0]) < 2e-2
            assert relative_error(lse[:, head : head + 1, rows], exact[1]) < 1e-4


@pytest.mark.gpu
def test_gpu_offsets_are_read_once():
    tensors = cuda_inputs((300, 300, 300), 1, 1, 72, torch.bfloat16)
    offsets = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 10, 300], device="cuda"))
    attention(*tensors, provider="triton", **offsets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = attention(*tensors, provider="triton", **offsets)
        torch.autograd.grad((out, lse), tensors, (torch.ones_like(out), torch.ones_like(lse)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    offsets["cu_seqlens_q"][1] = 301
    with pytest.raises(ValueError, match=r"never fall and end at the length 300, got \[0, 301, 300\]"):
        attention(*tensors, provider="triton", **offsets)
