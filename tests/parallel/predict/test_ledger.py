"""Opened strategy ops: what they send and compute inside equals their own formulas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from longreel.kernels import attention_packed, bias_gelu, pack_heads
from longreel.models.sequence import AttentionShape, SequenceLengths
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.predict.fake_world import fake_world
from longreel.parallel.predict.ledger import OpLedger
from longreel.parallel.predict.lifetimes import StorageTracker
from longreel.parallel.strategies import build_strategy

HEADS, HEAD_DIM, VALID = 16, 8, 1021


@pytest.fixture(params=[2, 4, 8])
def degree(request: pytest.FixtureRequest) -> Iterator[int]:
    with fake_world(8):
        yield request.param


@pytest.mark.parametrize(("strategy", "chunks"), [("ulysses", None), ("ulysses", 2), ("fastseq", None)])
def test_bytes_sent_and_flops_inside_equal_the_formulas(strategy: Any, chunks: int | None, degree: int) -> None:
    config = ParallelConfig(strategy=strategy, sp_degree=degree, head_chunks=chunks, attention_provider="sdpa-flash")
    sp = build_strategy(config, build_mesh(sp_degree=degree))
    width, rows = HEADS * HEAD_DIM, -(-VALID // degree)
    ledger = OpLedger()
    with FakeTensorMode():
        x = torch.empty(2, rows, width, dtype=torch.bfloat16, requires_grad=True)
        qkv = nn.Linear(width, 3 * width, dtype=torch.bfloat16)
        lengths = SequenceLengths(valid=VALID, padded=rows * degree)
        with StorageTracker(ledger):
            ledger.phase = "forward"
            out = sp.self_attention(x, qkv, num_heads=HEADS, lengths=lengths)
            ledger.phase = "backward"
            out.sum().backward()
        with FlopCounterMode(display=False) as counter:
            sp.self_attention(x, qkv, num_heads=HEADS, lengths=lengths).sum().backward()
    traffic = sp.traffic(AttentionShape(batch=2, seq_len=VALID, num_heads=HEADS, head_dim=HEAD_DIM, element_size=2))
    for phase, sent in (("forward", traffic.forward_bytes), ("backward", traffic.backward_bytes)):
        assert sent == sum(c.bytes * n for c, n in ledger.costs.items() if c.kind == "collective" and c.phase == phase)
    assert sum(cost.flops * calls for cost, calls in ledger.costs.items()) == counter.get_total_flops()
    assert {cost.chunks for cost in ledger.costs if cost.kind == "collective"} == {chunks or 1}


@pytest.mark.parametrize(("overlap", "chunks"), [("projection", 1), ("attention", 4)])
def test_exchanges_beside_attention_are_told_apart(overlap: Any, chunks: int) -> None:
    config = ParallelConfig(strategy="fastseq", sp_degree=4, fastseq_overlap=overlap, attention_provider="sdpa-flash")
    ledger = OpLedger()
    with fake_world(4):
        sp = build_strategy(config, build_mesh(sp_degree=4))
        with FakeTensorMode(), StorageTracker(ledger):
            x = torch.empty(1, 8, HEADS * HEAD_DIM, dtype=torch.bfloat16, requires_grad=True)
            qkv = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM, dtype=torch.bfloat16)
            lengths = SequenceLengths(valid=32, padded=32)
            sp.self_attention(x, qkv, num_heads=HEADS, lengths=lengths).sum().backward()
    sends = [cost for cost in ledger.costs if cost.name == "send"]
    assert {(cost.scope, cost.chunks) for cost in sends} == {
        ("fastseq_attention", chunks),
        ("fastseq_attention_backward", chunks),
    }


def test_attention_is_one_op_whose_buffers_show() -> None:
    ledger = OpLedger()
    with FakeTensorMode(), StorageTracker(ledger) as tracker:
        qkv = torch.empty(1, 256, 3, 2, 72, dtype=torch.bfloat16)
        out, lse = attention_packed(qkv, provider="sdpa-flash")
        held = tracker.current
    (cost,) = (c for c in ledger.costs if c.kind == "attention")
    assert (cost.name, cost.flops, cost.head_dim) == ("attention_packed", 4 * 256 * 256 * 2 * 72, 72)
    assert cost.bytes == sum(t.numel() * t.element_size() for t in (qkv, out, lse))
    assert [c.name for c in ledger.costs if c.bytes and c.kind == "memory"] == []
    # The provider hands its result on without a copy; its lse, laid out otherwise, is copied once.
    assert tracker.peak == held + lse.numel() * 4


@pytest.mark.parametrize(("head_dim", "padded"), [(64, 64), (72, 96)])
def test_backward_of_flash_attention_by_hand(head_dim: int, padded: int) -> None:
    with FakeTensorMode(), StorageTracker(OpLedger()) as tracker:
        qkv = torch.empty(1, 256, 3, 2, head_dim, dtype=torch.bfloat16, requires_grad=True)
        out, _ = attention_packed(qkv, provider="sdpa-flash")
        tracker.phase = "backward"
        out.backward(torch.empty_like(out))
    rows = 256 * 2
    # bf16: q, k, v, out, its gradient and the kernel's three; fp32: lse, the accumulator of dQ and its row sums.
    in_kernel = 8 * rows * head_dim * 2 + 4 * rows * (1 + padded + 1)
    # Afterwards the three gradients stand beside the one that the op returns.
    stacking = 11 * rows * head_dim * 2 + 4 * rows
    assert tracker.peaks["backward"] == max(in_kernel, stacking)


@pytest.mark.parametrize(("opened", "peak"), [(False, 2), (True, 9)], ids=["fused", "eager"])
def test_pointwise_ops_are_fused_unless_opened(opened: bool, peak: int) -> None:
    with FakeTensorMode(), StorageTracker(OpLedger(open_pointwise=opened)) as tracker:
        x, bias = torch.empty(64, 1024, dtype=torch.bfloat16), torch.empty(1024, dtype=torch.bfloat16)
        y = bias_gelu(x, bias)
    assert y.shape == x.shape
    tensors = tracker.peak / (x.numel() * 2)
    assert tensors == pytest.approx(peak, abs=0.5) if not opened else tensors > peak


def test_pointwise_ops_are_filed_as_memory_traffic() -> None:
    ledger = OpLedger()
    with FakeTensorMode(), StorageTracker(ledger):
        x = torch.empty(2, 64, 128, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.empty(128, dtype=torch.bfloat16, requires_grad=True)
        packed = pack_heads(x.unflatten(-1, (1, 8, 16)), num_ranks=2)
        bias_gelu(x, bias).sum().backward()
    named = {cost.name: cost for cost in ledger.costs}
    assert packed.shape == (2, 2, 64, 1, 4, 16)
    assert {named[n].kind for n in ("bias_gelu", "bias_gelu_backward", "sp_pack_heads")} == {"memory"}
    assert named["sp_pack_heads"].bytes == 2 * x.numel() * 2
    assert named["bias_gelu"].bytes == 2 * x.numel() * 2 + 2 * 128
    assert not any(cost.flops for cost in ledger.costs)


def test_unknown_collective_is_an_error_not_a_zero() -> None:
    with (
        fake_world(2),
        FakeTensorMode(),
        StorageTracker(OpLedger()),
        pytest.raises(ValueError, match="c10d::broadcast_"),
    ):
        torch.distributed.broadcast(torch.empty(4), src=0)
