"""longreel.bench.peers: other projects' attention in a strategy's place, behind the same gate as ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from longreel.bench import gate, peers
from longreel.bench.cases import Point
from longreel.bench.grids import MeasuredGrid, measured_points
from longreel.bench.measure import RankResult, measure_points
from longreel.bench.peers import PEERS, Peer, relabelled
from longreel.bench.presets import small_dit

SEQ_LEN = 64
MODEL = small_dit(depth=1, hidden_size=32)


def points(name: str, degree: int, policies=("none",)) -> list[Point]:
    grid = MeasuredGrid(
        seq_lens=(SEQ_LEN,),
        ranks=(degree,),
        sp_degrees=(degree,),
        strategies=(),
        policies=policies,
        peers=(name,),
        model=MODEL,
    )
    return [point for point in measured_points(grid, device="CPU") if point.peer == name]


@pytest.fixture(scope="module")
def oracle_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("oracle") / "oracle.pt"
    gate.write_oracle(MODEL, SEQ_LEN, 1, 0, str(path))
    return str(path)


def exchanged(strategy, mesh, *, scale: float = 1.0) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Ulysses as a package might write it: one all-to-all each for q, k, v and the output, of torch.distributed."""
    group = mesh.grid["sp"].get_group()

    class Exchange(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, to_heads: bool) -> Tensor:
            ctx.to_heads = to_heads
            size = group.size()
            if to_heads:
                parts = x.unflatten(2, (size, -1)).movedim(2, 0).contiguous()
            else:
                parts = x.unflatten(1, (size, -1)).movedim(1, 0).contiguous()
            received = torch.empty_like(parts)
            torch.distributed.all_to_all_single(received, parts, group=group)
            return received.movedim(0, 1).flatten(1, 2) if to_heads else received.movedim(0, 2).flatten(2, 3)

        @staticmethod
        def backward(ctx, grad: Tensor):
            return Exchange.apply(grad, not ctx.to_heads), None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [Exchange.apply(x, True) for x in (q, k, v)]
        return Exchange.apply(peers.attention(*heads, provider="torch")[0] * scale, False)

    return attend


def measure_stand_in(scale: float, of: list[Point], path: str) -> list[RankResult]:
    """measure_points with a peer of our own (in a worker)."""
    stand_in = Peer(
        packages=("torch",),
        hybrid=False,
        needs_cuda=False,
        attention="torch",
        attend=lambda strategy, mesh: exchanged(strategy, mesh, scale=scale),
    )
    with mock.patch.dict(PEERS, {"deepspeed-ulysses": stand_in}):
        return measure_points(of, path)


def test_peer_is_gated_timed_and_its_traffic_is_the_sequences(run_distributed, oracle_file) -> None:
    asked = points("deepspeed-ulysses", 2, policies=("none", "full"))
    for results in run_distributed(measure_stand_in, 2, 1.0, asked, oracle_file):
        for result in results:
            assert result.reason is None
            assert len(result.samples_s) >= 3
            assert result.traffic_formula == {}
        # As ours: q, k, v and out, 4 M (P - 1) / P^2 each way, and forward once more where it is recomputed.
        sent = 4 * SEQ_LEN * MODEL.hidden_size * 4 // 4
        assert [result.traffic["sequence.all_to_all"] for result in results] == [2 * sent, 3 * sent]


def test_wrong_peer_gets_no_timing(run_distributed, oracle_file) -> None:
    for (result,) in run_distributed(measure_stand_in, 2, 1.01, points("deepspeed-ulysses", 2), oracle_file):
        assert "differs" in result.reason
        assert result.samples_s == ()


def test_missing_package_and_device_are_the_reason(monkeypatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert "deepspeed not installed" in points("deepspeed-ulysses", 2)[0].impossible
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    assert points("deepspeed-ulysses", 2)[0].impossible is None
    assert "CUDA only" in points("yunchang-usp", 4)[0].impossible
    # Its ring has no backward without flash-attn.
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "flash_attn" else object())
    assert "flash_attn not installed" in points("yunchang-usp", 4)[0].impossible


def test_hybrids_need_a_degree_that_leaves_a_ring() -> None:
    assert points("yunchang-usp", 2) == []
    (point,) = points("yunchang-usp", 4)
    assert (point.parallel.strategy, point.parallel.ulysses_degree, point.strategy) == ("usp", 2, "yunchang-usp")
    assert point.record("skipped", reason="so it is", provenance={}).attention == "flash-attn"


def test_what_a_peer_sends_is_told_from_what_the_engine_sends() -> None:
    counted = {"sharding.all_to_all": 5, "sharding.send": 2, "sharding.all_gather": 7, "sequence.send": 1}
    assert relabelled(counted) == {"sequence.all_to_all": 5, "sequence.send": 3, "sharding.all_gather": 7}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("degree", [2, 4])
def test_deepspeed_passes_the_gate(run_distributed, oracle_file, degree) -> None:
    asked = points("deepspeed-ulysses", degree, policies=("none", "full"))
    for results in run_distributed(measure_points, degree, asked, oracle_file):
        for result in results:
            assert result.reason is None
            assert result.traffic["sequence.all_to_all"] > 0
