"""The Triton attention kernels on a GPU (-m gpu): against the definition, PyTorch's flash attention and themselves."""

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

from longreel.kernels import attention, attention_packed, reference
from longreel.kernels.numerics import relative_error

pytest.importorskip("triton")


def _load_cases() -> Any:
    """attention_cases.py beside this file, which no path leads to."""
    spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).with_name("attention_cases.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _load_cases()


def cuda_inputs(lengths: tuple[int, ...], batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().cuda().requires_grad_() for t in cases.make(lengths, batch, heads, head_dim, dtype)]


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
        out, lse = cases.definition(*inputs, 0.2)
        torch.manual_seed(1)
        w_out = torch.randn(out.shape, device="cuda").to(dtype).to(out.dtype)
        w_lse = torch.randn(lse.shape, device="cuda").to(lse.dtype)
        return [out.detach(), lse.detach(), *torch.autograd.grad((out * w_out).sum() + (lse * w_lse).sum(), inputs)]

    cases.hold_to_the_bar(got, by_hand(tensors), by_hand(wide), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_gpu_long_sequences_match_sdpa_in_error(head_dim, dtype):
    tensors = cuda_inputs((16_383, 16_385, 16_385), 1, 2, head_dim, dtype)
    exact = cuda_results("torch", [t.detach().float().requires_grad_() for t in tensors], dtype)
    cases.hold_to_the_bar(cuda_results("triton", tensors), cuda_results("sdpa-flash", tensors), exact, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_gpu_atomic_backward_matches_the_deterministic_one_in_error(head_dim):
    tensors = cuda_inputs((4_099, 4_097, 4_097), 1, 2, head_dim, torch.bfloat16)
    exact = cuda_results("torch", [t.detach().float().requires_grad_() for t in tensors], torch.bfloat16)
    cases.hold_to_the_bar(
        cuda_results("triton-atomic", tensors), cuda_results("triton", tensors), exact, torch.bfloat16
    )


@pytest.mark.gpu
def test_gpu_packed_segments_match_separate_ones():
    bounds = [0, 0, 700, 701, 701, 3000]
    tensors = cuda_inputs((3000, 3000, 3000), 1, 2, 72, torch.bfloat16)
    offsets = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor(bounds, dtype=torch.int32, device="cuda"))
    exact = cuda_results("torch", [t.detach().float().requires_grad_() for t in tensors], torch.bfloat16, **offsets)
    eager = cuda_results("sdpa-flash", tensors, **offsets)
    cases.hold_to_the_bar(cuda_results("triton", tensors, **offsets), eager, exact, torch.bfloat16)


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
@pytest.mark.parametrize("provider", ["triton", "triton-atomic", "triton-hopper"])
def test_gpu_rows_spread_beyond_two_to_the_31_elements(provider):
    # Every twelfth row of 2.8e9 elements, read and, of the gradients, written: short enough for all of backward.
    if provider == "triton-hopper" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is for Hopper GPUs")
    check_spread_rows(provider, torch.device("cuda"), 819_200, 16)


def check_spread_rows(provider: str, device: torch.device, length: int, heads: int) -> None:
    from longreel.kernels.triton_attention import backward_into

    torch.manual_seed(0)
    shape, scale = (1, length, 3, heads, 72), 72**-0.5
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    qkv, dqkv = (torch.zeros(shape, device=device, dtype=dtype)[:, 5::12] for _ in range(2))
    qkv.normal_()
    out, lse = attention_packed(qkv, provider=provider)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    upstream = dout, dlse, qkv.unbind(2), out, lse, scale, None, None
    backward_into(dqkv.unbind(2), *upstream, atomic=provider == "triton-atomic")
    for rows, head in itertools.product((slice(0, 4), slice(-4, None)), (0, heads - 1)):
        one = slice(head, head + 1)
        q, k, v, dq, dk, dv = (t[:, :, one] for t in (*qkv.unbind(2), *dqkv.unbind(2)))
        exact = reference.attention_fwd(q[:, rows].float(), k, v, scale, None, None)
        assert relative_error(out[:, rows, one], exact[0]) < 2e-2
        assert relative_error(lse[:, one, rows], exact[1]) < 1e-4
        # A query's gradient is that of it alone, and so is a key's where the lse is that of all keys.
        whole = dout[:, :, one].float(), dlse[:, one], out[:, :, one], lse[:, one]
        some = dout[:, rows, one].float(), dlse[:, one, rows], out[:, rows, one], lse[:, one, rows]
        by_query = reference.attention_bwd(some[0], some[1], q[:, rows].float(), k, v, *some[2:], scale, None, None)
        by_key = reference.attention_bwd(
            *whole[:2], q, k[:, rows].float(), v[:, rows].float(), *whole[2:], scale, None, None
        )
        for got, want in ((dq, by_query[0]), (dk, by_key[1]), (dv, by_key[2])):
            assert relative_error(got[:, rows], want) < 2e-2


def test_spread_rows_interpreted(run_interpreted):
    for provider in ("triton", "triton-atomic"):
        run_interpreted(check_spread_rows, provider, torch.device("cpu"), 700, 2)


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
