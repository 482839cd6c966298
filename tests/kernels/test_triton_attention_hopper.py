"""The warp-specialised Gluon kernel: emulated against the definition, and on a GPU (-m gpu)."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from longreel.kernels import attention, reference
from longreel.kernels.numerics import KERNEL_ERROR_FACTOR, relative_error

pytest.importorskip("triton")

HEADS = 16


def inputs(lengths: tuple[int, int], batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, n, heads, head_dim).to(dtype) for n in (lengths[0], lengths[1], lengths[1])]


def offsets(bounds: list[int] | Tensor | None) -> Tensor | None:
    return torch.tensor(bounds, dtype=torch.int32) if isinstance(bounds, list) else bounds


def hold_to_the_bar(got: tuple[Tensor, Tensor], eager: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
    for name, a, e, b in zip(("out", "lse"), got, eager, exact, strict=True):
        assert torch.equal(a == -math.inf, b == -math.inf), name
        a, e, b = (t.masked_fill(t == -math.inf, 0.0) for t in (a, e, b))
        allowed = KERNEL_ERROR_FACTOR * relative_error(e, b) + 2 * torch.finfo(got[0].dtype).eps
        assert relative_error(a, b) <= allowed, name


def emulated(
    qkv: list[Tensor],
    scale: float = 0.3,
    cu_q: list[int] | Tensor | None = None,
    cu_k: list[int] | Tensor | None = None,
    num_programs: int = 2,
    **tiles: int,
) -> tuple[Tensor, Tensor]:
    """The kernel at its production tiles, on two programs, so that each has several tiles of queries."""
    from gluon_emulator import run_kernel

    from longreel.kernels.triton_attention_hopper import plan_forward
    from longreel.kernels.triton_attention_tuning import HopperTiles

    q = qkv[0]
    out = torch.full(q.shape, math.nan, dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan)
    chosen = HopperTiles(**tiles) if tiles else None
    plan = plan_forward(*qkv, out, lse, scale, offsets(cu_q), offsets(cu_k), tiles=chosen)
    run_kernel(plan.kernel, min(num_programs, plan.num_programs), plan.arguments)
    return out, lse


def check(qkv: list[Tensor], scale: float = 0.3, cu_q: Any = None, cu_k: Any = None, **tiles: int) -> None:
    got = emulated(qkv, scale, cu_q, cu_k, **tiles)
    exact = reference.attention_fwd(*(t.double() for t in qkv), scale, offsets(cu_q), offsets(cu_k))
    eager = reference.attention_fwd(*qkv, scale, offsets(cu_q), offsets(cu_k))
    hold_to_the_bar(got, eager, exact)


@pytest.fixture(autouse=True)
def _emulator_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize("head_dim", [16, 24, 32, 40, 64, 72, 128])
def test_emulated_equals_the_definition(head_dim):
    check(inputs((300, 401), 1, 2, head_dim, torch.float16))


@pytest.mark.parametrize("lengths", [(1, 1), (1, 129), (129, 1), (128, 128), (128, 1024)], ids=str)
def test_emulated_lengths_at_the_edges(lengths):
    check(inputs(lengths, 2, 1, 72, torch.float16))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 40.0], ids=["negative", "zero", "sharp"])
def test_emulated_any_softmax_scale(scale):
    check(inputs((65, 200), 1, 1, 72, torch.float16), scale)


def test_emulated_packed_sequences():
    cu_q = [0, 0, 17, 200, 200, 200, 336, 341, 341]
    cu_k = [0, 3, 36, 36, 240, 240, 241, 457, 457]
    check(inputs((341, 457), 1, 2, 72, torch.float16), 0.3, cu_q, cu_k)


@pytest.mark.parametrize("head_dim", [16, 40, 64, 72, 128])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_emulated_packed_sequences_do_not_touch_each_other(value, head_dim):
    bounds = [0, 150, 310, 400]
    clean = inputs((400, 400), 1, 1, head_dim, torch.float16)
    dirty = [t.clone() for t in clean]
    for t in dirty:
        t[:, 150:310] = value
    others = torch.cat((torch.arange(150), torch.arange(310, 400)))
    got, want = (emulated(qkv, 0.3, bounds, bounds) for qkv in (dirty, clean))
    assert torch.equal(got[0][:, others], want[0][:, others]) and torch.equal(got[1][..., others], want[1][..., others])
    assert not got[0][:, 150:310].isfinite().any()


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_emulated_op_passes_opcheck(monkeypatch, packed):
    """Schema, fake implementation and registration; the backward, which is provider triton's, has its own."""
    from gluon_emulator import run_kernel

    from longreel.kernels import triton_attention_hopper as hopper
    from longreel.kernels.triton_attention_plan import Launch

    monkeypatch.setattr(hopper, "check_hopper", lambda *_: None)
    monkeypatch.setattr(hopper, "launch_on", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Launch, "run", lambda plan: run_kernel(plan.kernel, min(2, plan.num_programs), plan.arguments))
    cu = offsets([0, 5, 5, 70]) if packed else None
    qkv = torch.randn(1 if packed else 2, 70, 3, 2, 72).half()
    opcheck(torch.ops.longreel.attention.default, (*qkv.unbind(2), 0.3, cu, cu, "triton-hopper"))
    opcheck(torch.ops.longreel.attention_packed.default, (qkv, 0.3, cu, "triton-hopper"))


def test_emulated_offsets_may_be_strided():
    qkv = inputs((400, 400), 1, 1, 72, torch.float16)
    bounds = offsets([0, 150, 310, 400])
    strided = torch.stack((bounds, torch.full_like(bounds, 200)), 1).flatten()[::2]
    assert strided.stride() == (2,)
    for a, b in zip(emulated(qkv, 0.3, strided, strided), emulated(qkv, 0.3, bounds, bounds), strict=True):
        assert torch.equal(a, b)


def test_emulated_with_three_consumers_and_short_stages():
    qkv = inputs((400, 500), 1, 1, 72, torch.float16)
    check(qkv, block_n=64, consumers=3, num_stages=6, registers=160, poly=2)
    check(qkv, block_n=64, consumers=2, num_stages=2, registers=240, poly=0)
    # A consumer waits for the keys after the next before it leaves v: one stage would wait for itself.
    with pytest.raises(ValueError, match="num_stages 1 would deadlock; it must be at least 2"):
        check(qkv, block_n=64, consumers=2, num_stages=1, registers=240, poly=0)


def test_emulated_views_of_the_projection():
    torch.manual_seed(0)
    qkv = torch.randn(2, 150, 3, 2, 72).half()[:, 7:140]
    check(list(qkv.unbind(2)))


def test_emulated_nan_in_a_query_stays_in_its_row():
    q, k, v = inputs((100, 150), 1, 1, 72, torch.float16)
    q[0, 3] = math.nan
    out, lse = emulated([q, k, v])
    bad = torch.zeros(100, dtype=torch.bool)
    bad[3] = True
    assert torch.equal(out[0, :, 0].isnan().all(-1), bad)
    assert torch.equal(lse[0, 0].isnan(), bad)


def test_emulated_nan_in_a_key_reaches_every_row():
    # Behind the last tile of keys, which is computed first and without polynomials.
    for position in range(8):
        q, k, v = inputs((70, 300), 1, 1, 72, torch.float16)
        k[0, position] = math.nan
        out, lse = emulated([q, k, v], block_n=64, consumers=2, num_stages=2, registers=240, poly=4)
        assert out.isnan().all() and lse.isnan().all()


def test_emulated_scores_of_minus_infinity_weigh_nothing():
    # In bf16, where 2^-126 is no zero.
    q, k, v = inputs((70, 300), 1, 1, 72, torch.bfloat16)
    q[0, :, 0, 0], k[..., 0] = 1.0, -math.inf
    # Rows whose scores are all -inf are as those without keys; others see the keys that are finite.
    out, lse = emulated([q, k, v], block_n=64, consumers=2, num_stages=2, registers=240, poly=4)
    assert torch.equal(out, torch.zeros_like(out)) and (lse == -math.inf).all()
    k[0, 100:120, :, 0] = 0.5
    got = emulated([q, k, v], block_n=64, consumers=2, num_stages=2, registers=240, poly=4)
    exact = reference.attention_fwd(*(t.double() for t in (q, k[:, 100:120], v[:, 100:120])), 0.3, None, None)
    hold_to_the_bar(got, reference.attention_fwd(q, k[:, 100:120], v[:, 100:120], 0.3, None, None), exact)


@pytest.mark.parametrize("fault", ["reads-too-soon", "never-released"])
def test_emulator_finds_faults_of_the_protocol(monkeypatch, fault):
    import gluon_emulator

    if fault == "reads-too-soon":
        for name in ("wait", "change"):
            monkeypatch.setattr(gluon_emulator.Barrier, name, lambda self, *args, **options: None)
    else:
        change = gluon_emulator.Barrier.change
        # Arrivals without bytes are the consumers': they release a stage.
        monkeypatch.setattr(
            gluon_emulator.Barrier,
            "change",
            lambda self, arrivals=0, expected=0: expected and change(self, arrivals, expected),
        )
        monkeypatch.setattr(gluon_emulator, "TIMEOUT", 0.2)
    with pytest.raises((AssertionError, TimeoutError)):
        check(inputs((300, 901), 1, 1, 72, torch.float16))


def polynomials(values: list[float]) -> Tensor:
    """2^x by all eight polynomials of a piece of assembly."""
    from ptx_emulator import exp2_mixed

    return exp2_mixed(torch.tensor(values), 8)


def test_polynomial_exponentials_are_far_below_the_rounding_of_bf16():
    from longreel.kernels.triton_attention_exp import exp2_assembly

    assert "ex2" not in str(exp2_assembly(8))
    assert Counter(str(exp2_assembly(2)).split())["ex2.approx.ftz.f32"] == 6
    grid = [-i * 0.0137 for i in range(2000)] + [0.0, -0.5, -125.0, -125.4] + [0.03] * 4
    exact = torch.tensor(grid).double().exp2()
    assert (polynomials(grid).double() / exact - 1).abs().max() < 1.1e-4
    # Far below, nothing that a sum in bf16 or fp16 would see, and zero in the end.
    assert polynomials([-126.0, -126.4, -126.6, -127.0] * 2).max() <= 2.0**-125
    assert not polynomials([-127.0, -127.4, -200.0, -1e4, -1e30, -3e38, -math.inf, -math.inf]).any()


def test_polynomial_exponentials_of_nan_are_nan():
    assert polynomials([math.nan] * 8).isnan().all()


def test_what_the_kernel_cannot_take_is_refused_with_the_reason():
    from longreel.kernels.triton_attention_hopper import check_hopper

    q = torch.empty(1, 8, 2, 72, dtype=torch.bfloat16, device="meta")
    with pytest.raises(
        ValueError, match="runs on a Hopper GPU only, not on cpu nor interpreted; use provider 'triton'"
    ):
        check_hopper(*(torch.empty(1, 8, 2, 72, dtype=torch.bfloat16),) * 3)
    with pytest.raises(ValueError, match=r"q has head_dim 96; provider 'triton-hopper' has \[16, 24, 32, 40, 64, 72"):
        check_hopper(*(q.new_empty(1, 8, 2, 96),) * 3)
    with pytest.raises(ValueError, match=r"q has dtype torch.float32; .* bfloat16 and float16"):
        check_hopper(*(q.float(),) * 3)
    with pytest.raises(ValueError, match=r"k has strides \(1232, 154, 77, 1\); TMA needs multiples of 8 but 0"):
        check_hopper(q, q.new_empty(1, 8, 2, 77)[..., :72], q)
    with pytest.raises(ValueError, match=r"v has strides .*; TMA needs multiples of 8 but 0"):
        check_hopper(q, q, q[:, :1].expand(1, 8, 2, 72))
    with pytest.raises(ValueError, match="k starts 8 bytes off a multiple of 16"):
        check_hopper(q, q.new_empty(1, 8, 2, 80)[..., 4:76], q)


def on_gpu(lengths: tuple[int, int], batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is for Hopper GPUs")
    return [t.cuda() for t in inputs(lengths, batch, heads, head_dim, dtype)]


def chunked_truth(q: Tensor, k: Tensor, v: Tensor, rows: int = 2048) -> tuple[Tensor, Tensor]:
    parts = [attention(part, k.float(), v.float(), provider="torch") for part in q.float().split(rows, 1)]
    return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 32, 40, 64, 72, 128])
@pytest.mark.parametrize("lengths", [(1, 1), (127, 129), (1000, 1537), (8191, 8193)], ids=str)
def test_gpu_error_is_that_of_the_portable_kernel(lengths, head_dim, dtype):
    qkv = on_gpu(lengths, 2, 3, head_dim, dtype)
    hold_to_the_bar(attention(*qkv, provider="triton-hopper"), attention(*qkv, provider="triton"), chunked_truth(*qkv))


@pytest.mark.gpu
def test_gpu_op_passes_opcheck():
    q, k, v = (t.requires_grad_() for t in on_gpu((70, 130), 2, 2, 72, torch.bfloat16))
    opcheck(torch.ops.longreel.attention.default, (q, k, v, 0.3, None, None, "triton-hopper"))


@pytest.mark.gpu
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_gpu_packed_sequences_do_not_touch_each_other(value):
    bounds = torch.tensor([0, 150, 310, 400], dtype=torch.int32, device="cuda")
    clean = on_gpu((400, 400), 1, 3, 72, torch.bfloat16)
    dirty = [t.clone() for t in clean]
    for t in dirty:
        t[:, 150:310] = value
    cu = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    got, want = (attention(*qkv, provider="triton-hopper", **cu) for qkv in (dirty, clean))
    for part in (slice(0, 150), slice(310, 400)):
        assert torch.equal(got[0][:, part], want[0][:, part]) and torch.equal(got[1][..., part], want[1][..., part])


@pytest.mark.gpu
def test_gpu_packed_segments_and_repeated_runs():
    bounds = torch.tensor([0, 0, 700, 701, 701, 3000], dtype=torch.int32, device="cuda")
    cu = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    qkv = on_gpu((3000, 3000), 1, 2, 72, torch.bfloat16)
    first = attention(*qkv, provider="triton-hopper", **cu)
    exact = attention(*(t.float() for t in qkv), provider="torch", **cu)
    hold_to_the_bar(first, attention(*qkv, provider="triton", **cu), exact)
    # A race would change bits.
    for _ in range(20):
        for a, b in zip(attention(*qkv, provider="triton-hopper", **cu), first, strict=True):
            assert torch.equal(a, b)
