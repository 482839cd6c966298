"""longreel.kernels.attention: every provider against the definition in fp64, and what it does with bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from longreel.kernels import attention, attention_packed, reference, resolve_attention_provider, triton_common
from longreel.kernels.attention import attention_op, attention_packed_op
from longreel.kernels.numerics import KERNEL_ERROR_FACTOR, relative_error

# Those that run on a CPU as they are; test_triton_attention.py holds the Triton ones.
PROVIDERS = ("torch", "sdpa-flash")
SHAPES = [(1, 1, 1, 1, 8), (2, 7, 5, 3, 72), (1, 33, 65, 2, 40), (3, 5, 64, 1, 128)]
SHAPE_IDS = [f"B{b}-S{s}-T{t}-H{h}-D{d}" for b, s, t, h, d in SHAPES]


def inputs(batch: int, s: int, t: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    lengths = (s, t, t)
    return [torch.randn(batch, n, heads, head_dim, dtype=dtype, requires_grad=True) for n in lengths]


def definition(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v written out, differentiated by autograd."""
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v), scores.logsumexp(-1)


def grads_of(fn, tensors: list[Tensor], seed: int = 1) -> list[Tensor]:
    """out, lse and the gradients of a random functional of both."""
    torch.manual_seed(seed)
    out, lse = fn(*tensors)
    loss = (out * torch.randn(out.shape, dtype=out.dtype)).sum() + (lse * torch.randn(lse.shape, dtype=lse.dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_outputs_and_gradients_equal_the_definition(provider, shape):
    tensors = inputs(*shape)
    got = grads_of(lambda *x: attention(*x, softmax_scale=0.3, provider=provider), tensors)
    want = grads_of(lambda *x: definition(*x, 0.3), tensors)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert relative_error(a, b, floor=1e-3) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_error_in_low_precision_is_that_of_rounding(provider, dtype):
    exact = [t.detach().to(dtype).double().requires_grad_() for t in inputs(2, 33, 17, 2, 72)]
    rounded = [t.detach().to(dtype).requires_grad_() for t in exact]
    want = grads_of(lambda *x: definition(*x, 0.1), exact)
    eager = grads_of(lambda *x: definition(*x, 0.1), rounded)
    got = grads_of(lambda *x: attention(*x, softmax_scale=0.1, provider=provider), rounded)
    assert got[1].dtype == torch.float32
    for name, a, e, b in zip(("out", "lse", "dq", "dk", "dv"), got, eager, want, strict=True):
        allowed = KERNEL_ERROR_FACTOR * relative_error(e, b) + 2 * torch.finfo(dtype).eps
        assert relative_error(a, b) <= allowed, name


def test_query_blocks_do_not_change_the_result(monkeypatch):
    tensors = inputs(2, 29, 31, 2, 16)
    whole = grads_of(lambda *x: attention(*x, provider="torch"), tensors)
    monkeypatch.setattr(reference, "BLOCK_Q", 8)
    for a, b in zip(grads_of(lambda *x: attention(*x, provider="torch"), tensors), whole, strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("provider", PROVIDERS)
def test_packed_sequences_equal_separate_ones(provider):
    torch.manual_seed(0)
    qkv = torch.randn(1, 12, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    bounds = [0, 5, 5, 12]
    packed = grads_of(lambda x: attention_packed(x, cu_seqlens=torch.tensor(bounds), provider=provider), [qkv])

    def separate(x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [definition(*x[:, a:b].unbind(2), 8**-0.5) for a, b in ((0, 5), (5, 12))]
        return torch.cat([o for o, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=2)

    for a, b in zip(packed, grads_of(separate, [qkv]), strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("provider", PROVIDERS)
def test_empty_keys_give_zero_and_minus_infinity(provider):
    q, k, v = inputs(1, 4, 0, 2, 8)
    out, lse = attention(q, k, v, provider=provider)
    assert not out.any()
    assert torch.equal(lse, torch.full((1, 2, 4), -math.inf, dtype=torch.float64))
    out.sum().backward()
    assert not q.grad.any()
    # A packed segment without keys beside one with keys.
    q, k, v = inputs(1, 4, 3, 2, 8)
    offsets = {"cu_seqlens_q": torch.tensor([0, 2, 4]), "cu_seqlens_k": torch.tensor([0, 0, 3])}
    out, lse = attention(q, k, v, provider=provider, **offsets)
    assert not out[:, :2].any()
    assert torch.isneginf(lse[..., :2]).all()
    out.sum().backward()
    assert q.grad.isfinite().all()
    assert q.grad[:, 2:].any()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_strided_views_are_taken_as_they_are(provider):
    torch.manual_seed(0)
    wide = torch.randn(2, 11, 3, 2, 16, dtype=torch.float64)
    view = wide[:, 1:9].detach().requires_grad_()
    got = grads_of(lambda x: attention(*x.unbind(2), provider=provider), [view])
    packed = grads_of(lambda x: attention_packed(x, provider=provider), [view])
    want = grads_of(lambda x: definition(*x.unbind(2), 0.25), [view])
    for a, b, c in zip(got, packed, want, strict=True):
        assert relative_error(a, c) < 1e-12
        assert relative_error(b, c) < 1e-12


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_element_of_the_outputs_is_written(provider):
    tensors = inputs(2, 9, 6, 2, 8)
    assert all(t.isfinite().all() for t in grads_of(lambda *x: attention(*x, provider=provider), tensors))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("keys", [1, 4, 15, 17, 300])
def test_nan_in_a_query_stays_in_its_row(keys, dtype, provider):
    q, k, v = (t.detach() for t in inputs(1, 5, keys, 2, 8, dtype))
    q[0, 2, 1, 3] = math.nan
    out, lse = attention(q, k, v, provider=provider)
    rows = torch.zeros(5, 2, dtype=torch.bool)
    rows[2, 1] = True
    assert torch.equal(out[0].isnan().any(-1), rows) and torch.equal(out[0].isnan().all(-1), rows)
    assert torch.equal(lse[0].isnan(), rows.T)
    assert out[0][~rows].isfinite().all() and lse[0][~rows.T].isfinite().all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("keys", [1, 4, 15, 17])
def test_nan_in_a_key_is_in_every_row_of_its_head(keys, provider):
    q, k, v = (t.detach() for t in inputs(1, 5, keys, 2, 8))
    k[0, keys - 1, 1, 3] = math.nan
    out, lse = attention(q, k, v, provider=provider)
    assert out[:, :, 1].isnan().all() and lse[:, 1].isnan().all()
    assert out[:, :, 0].isfinite().all() and lse[:, 0].isfinite().all()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ops_pass_opcheck_and_gradcheck(provider):
    tensors = inputs(2, 5, 3, 2, 8)
    opcheck(attention_op, (*tensors, 0.3, None, None, provider))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, provider=provider), tensors)
    qkv = torch.randn(1, 6, 3, 1, 8, dtype=torch.float64, requires_grad=True)
    opcheck(attention_packed_op, (qkv, 0.3, torch.tensor([0, 2, 6]), provider))
    assert torch.autograd.gradcheck(lambda x: attention_packed(x, provider=provider), [qkv])


def test_compiles_without_graph_breaks():
    tensors = inputs(1, 5, 3, 2, 8)
    compiled = torch.compile(lambda *x: attention(*x), backend="aot_eager", fullgraph=True)
    for a, b in zip(grads_of(compiled, tensors), grads_of(attention, tensors), strict=True):
        assert torch.equal(a, b)


def test_flops_count_five_products_in_backward():
    q, k, v = inputs(2, 10, 7, 3, 16)
    with FlopCounterMode(display=False) as counter:
        out, _ = attention(q, k, v)
        assert counter.get_total_flops() == 4 * 2 * 10 * 7 * 3 * 16
        out.sum().backward()
    assert counter.get_total_flops() == 14 * 2 * 10 * 7 * 3 * 16


def q_k_v(**changes) -> dict:
    q, k, v = inputs(1, 4, 4, 2, 8, torch.float32)
    return {"q": q, "k": k, "v": v} | changes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (q_k_v(q=torch.randn(1, 4, 2, 12)), "q has head_dim 12; it must be a multiple of 8, at most 128"),
        (q_k_v(q=torch.randn(1, 4, 2, 136)), "head_dim 136"),
        (q_k_v(k=torch.randn(1, 4, 2, 8, dtype=torch.float16)), "k has dtype torch.float16, q has torch.float32"),
        (q_k_v(k=torch.randn(1, 4, 2, 8, device="meta")), "k is on meta, q on cpu"),
        (q_k_v(v=torch.randn(1, 3, 2, 8)), r"k \[1, 4, 2, 8\] and v \[1, 3, 2, 8\]"),
        (q_k_v(q=torch.randn(1, 4, 4, 8)), "must equal q"),
        (q_k_v(q=torch.randn(4, 2, 8)), r"q must be \[B, S, H, D\], got \[4, 2, 8\]"),
        (q_k_v(q=torch.randn(1, 4, 8, 2).transpose(2, 3)), "q's last dim has stride 2"),
        (q_k_v(cu_seqlens_q=torch.tensor([0, 4])), "give both or none"),
        (q_k_v(cu_seqlens_q=torch.tensor([0, 3, 2, 4]), cu_seqlens_k=torch.tensor([0, 1, 2, 4])), r"\[0, 3, 2, 4\]"),
        (q_k_v(cu_seqlens_q=torch.tensor([0, 4]), cu_seqlens_k=torch.tensor([0, 3])), "end at the length 4"),
        (q_k_v(cu_seqlens_q=torch.tensor([0, 4]), cu_seqlens_k=torch.tensor([0, 1, 4])), "it needs 2"),
        (q_k_v(cu_seqlens_q=torch.tensor([0.0, 4]), cu_seqlens_k=torch.tensor([0, 4])), "int32 or int64"),
        (
            q_k_v(cu_seqlens_q=torch.tensor([0, 4]), cu_seqlens_k=torch.tensor([0, 4], device="meta")),
            "cu_seqlens_k is on meta, the tensor it splits on cpu",
        ),
        (
            q_k_v(provider="triton"),
            "'triton' (is missing|needs a CUDA device, got tensors on cpu; set TRITON_INTERPRET=1)",
        ),
        (q_k_v(provider="cudnn"), "unknown attention provider 'cudnn'; providers are auto, torch, sdpa-flash, triton"),
    ],
)
def test_bad_input_is_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        attention(**arguments)


def test_packed_input_checks():
    with pytest.raises(ValueError, match=r"qkv must be \[B, S, 3, H, D\]"):
        attention_packed(torch.randn(1, 4, 2, 2, 8))
    with pytest.raises(ValueError, match="qkv has batch 2"):
        attention_packed(torch.randn(2, 4, 3, 2, 8), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="cu_seqlens is on meta, the tensor it splits on cpu"):
        attention_packed(torch.randn(1, 4, 3, 2, 8), cu_seqlens=torch.tensor([0, 4], device="meta"))


def test_auto_picks_by_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(triton_common, "_found", lambda: True)
    for dtype in (None, torch.bfloat16, torch.float16, torch.float32):
        assert resolve_attention_provider("auto", cpu, dtype) == "torch"
        assert resolve_attention_provider("auto", cuda, dtype) == "triton"
    # The Triton kernels do not compute in fp64, and flash attention on CUDA takes half precision only.
    assert resolve_attention_provider("auto", cuda, torch.float64) == "torch"
    with pytest.raises(ValueError, match=r"has no torch\.float32 on CUDA"):
        resolve_attention_provider("sdpa-flash", cuda, torch.float32)


def test_without_triton_nothing_takes_its_place(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(triton_common, "_found", lambda: False)
    for dtype in (None, torch.bfloat16, torch.float16, torch.float32):
        assert resolve_attention_provider("auto", cpu, dtype) == "torch"
        with pytest.raises(ValueError, match=r"triton is not installed; .* name provider torch .* sdpa-flash"):
            resolve_attention_provider("auto", cuda, dtype)
    assert resolve_attention_provider("auto", cuda, torch.float64) == "torch"
    for provider in ("triton", "triton-atomic", "triton-hopper"):
        with pytest.raises(ValueError, match=f"provider {provider!r} is missing: the package triton is not installed"):
            resolve_attention_provider(provider, cuda)
