"""longreel.bench.gate and measure: the right strategies pass, wrong ones get no timing."""

from __future__ import annotations

from dataclasses import fields, replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from longreel.bench import gate
from longreel.bench.cases import Point, Timing
from longreel.bench.grids import MeasuredGrid, measured_points
from longreel.bench.measure import RankResult, measure_points
from longreel.bench.presets import small_dit
from longreel.models.sequence import SequenceLengths, Traffic
from longreel.parallel import parallelize
from longreel.parallel.config import STRATEGIES
from longreel.parallel.parallelize import ParallelDiT
from longreel.parallel.strategies import USP, Local, build_strategy

SEQ_LEN = 90
MODEL = small_dit(depth=1, hidden_size=32, num_heads=4)
TIMING = Timing(min_samples=2, max_samples=2, budget_s=0.0)


def point(strategy: str, *, ranks: int, degree: int, seq_len: int = SEQ_LEN) -> Point:
    grid = MeasuredGrid(seq_lens=(seq_len,), ranks=(ranks,), sp_degrees=(degree,), model=MODEL, strategies=STRATEGIES)
    found = [p for p in measured_points(grid, device="CPU") if p.parallel.strategy == strategy and not p.is_baseline]
    return replace(found[0], timing=TIMING)


@pytest.fixture(scope="module")
def oracle_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("oracle") / "oracle.pt"
    gate.write_oracle(MODEL, SEQ_LEN, 2, 0, str(path))
    return str(path)


@pytest.mark.parametrize(
    ("strategy", "ranks", "degree"),
    [
        ("local", 1, 1),
        ("local", 2, 1),
        ("ulysses", 2, 2),
        ("fastseq", 2, 2),
        ("fastseq", 4, 2),
        ("ring", 2, 2),
        ("usp", 4, 4),
    ],
    ids=["local-1", "local-dp2", "ulysses-sp2", "fastseq-sp2", "fastseq-dp2-sp2", "ring-sp2", "usp-sp4"],
)
def test_right_strategies_pass_and_are_timed(run_distributed, oracle_file, strategy, ranks, degree) -> None:
    points = [point(strategy, ranks=ranks, degree=degree)]
    results: list[RankResult] = [found for (found,) in run_distributed(measure_points, ranks, points, oracle_file)]
    for result in results:
        assert result.reason is None
        assert 0 < result.verdict.grad < 1e-5
        assert result.verdict.loss < 1e-5
        assert len(result.samples_s) == 2
        assert min(result.samples_s) > 0
        assert result.memory["process"] >= result.memory["process_before"] > 2**20
    # One time per step, that of the slowest rank, on every rank.
    assert len({result.samples_s for result in results}) == 1
    first = results[0]
    sequence = sum(sent for name, sent in first.traffic.items() if name.startswith("sequence."))
    assert sequence == sum(first.traffic_formula.values())
    assert (sequence > 0) == (degree > 1)
    assert (sum(first.traffic.values()) > sequence) == (ranks > 1)


class ScaledGradient(USP):
    """Attention's gradient is off by a part in a thousand."""

    def self_attention(self, x: Tensor, qkv, *, num_heads: int, lengths: SequenceLengths) -> Tensor:
        out = super().self_attention(x, qkv, num_heads=num_heads, lengths=lengths)
        out.register_hook(lambda grad: grad * 1.001)
        return out


class ScaledOutput(USP):
    """Attention's output is off by a part in a hundred."""

    def self_attention(self, x: Tensor, qkv, *, num_heads: int, lengths: SequenceLengths) -> Tensor:
        out = super().self_attention(x, qkv, num_heads=num_heads, lengths=lengths)
        return out * 1.01


class NotANumber(USP):
    """Attention gives NaN."""

    def self_attention(self, x: Tensor, qkv, *, num_heads: int, lengths: SequenceLengths) -> Tensor:
        out = super().self_attention(x, qkv, num_heads=num_heads, lengths=lengths)
        return out * float("nan")


class WrongFormula(USP):
    """The formula forgets the output's exchange."""

    def traffic(self, shape) -> Traffic:
        whole = super().traffic(shape)
        return Traffic(forward={"all_to_all": whole.forward_bytes * 3 // 4}, backward=whole.backward)


FAULTS = {cls.__name__: cls for cls in (ScaledGradient, ScaledOutput, NotANumber, WrongFormula)}


def measure_with_fault(fault: str, wrong: Point, path: str) -> RankResult:
    """measure_points with a wrong strategy in place of Ulysses (in a worker)."""

    def build(config, mesh):
        right = build_strategy(config, mesh)
        return FAULTS[fault](**{field.name: getattr(right, field.name) for field in fields(right)})

    with mock.patch.object(parallelize, "build_strategy", build):
        return measure_points([wrong], path)[0]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("ScaledGradient", "gradient of"),
        ("ScaledOutput", "loss differs"),
        ("NotANumber", "loss differs"),
        ("WrongFormula", "formula"),
    ],
)
def test_wrong_strategies_get_a_reason_and_no_timing(run_distributed, oracle_file, fault, reason) -> None:
    results = run_distributed(measure_with_fault, 2, fault, point("ulysses", ranks=2, degree=2), oracle_file)
    for result in results:
        assert reason in result.reason
        assert result.samples_s == ()
        assert result.memory == {}


def measure_seen_lengths(wanted: Point, path: str) -> list[int]:
    """Tokens of each step's sample on this rank, in order (in a worker)."""
    seen: list[int] = []
    loss = ParallelDiT.loss

    def seeing(model, batch):
        seen.append(batch.latents.shape[1] * batch.latents.shape[2] * batch.latents.shape[3] // 4)
        return loss(model, batch)

    with mock.patch.object(ParallelDiT, "loss", seeing):
        measure_points([wanted], path)
    return seen


def test_every_group_warms_up_on_what_it_is_timed_on(run_distributed, tmp_path) -> None:
    path, seq_len = str(tmp_path / "oracle.pt"), 2 * gate.SHORT_LEN
    gate.write_oracle(MODEL, seq_len, 2, 0, path)
    wanted = point("local", ranks=2, degree=1, seq_len=seq_len)
    seen = run_distributed(measure_seen_lengths, 2, wanted, path)
    # The gate's step, an untimed one, two timed ones.
    assert seen == [[seq_len] * 4, [gate.SHORT_LEN] + [seq_len] * 3]


def measure_with_unshared_gradients(wrong: Point, path: str) -> RankResult:
    """measure_points with the second group on the first one's sample: data parallelism over no data (in a worker)."""
    real = gate.make_sample

    def same(config, seq_len, *, index, seed):
        return real(config, seq_len, index=0, seed=seed)

    with mock.patch.object(gate, "make_sample", same):
        return measure_points([wrong], path)[0]


def test_groups_of_equal_data_are_wrong(run_distributed, oracle_file) -> None:
    results = run_distributed(measure_with_unshared_gradients, 2, point("local", ranks=2, degree=1), oracle_file)
    assert all("differs" in result.reason for result in results)


def test_oracle_in_blocks_is_eager_attention_of_the_whole(monkeypatch) -> None:
    seq_len = 2 * gate._QUERY_BLOCK + 3
    loss, grads = gate.oracle(MODEL, seq_len, index=0, seed=3)
    monkeypatch.setattr(gate, "EagerLocal", lambda: Local(provider="torch"))
    whole_loss, whole = gate.oracle(MODEL, seq_len, index=0, seed=3)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    verdict_errors = gate.gradient_errors(grads, whole)
    assert max(verdict_errors.values()) < 1e-5


def test_every_part_of_every_gradient_is_far_from_zero_but_the_key_bias() -> None:
    _, grads = gate.oracle(MODEL, SEQ_LEN, index=0, seed=0)
    fused = {"qkv": 3, "modulation": 6}
    norms = {}
    for name, grad in grads.items():
        parts = next((n for word, n in fused.items() if f".{word}." in name), 1)
        norms |= {(name, i): torch.linalg.vector_norm(part).item() for i, part in enumerate(grad.chunk(parts))}
    assert sum(parts[0].endswith("qkv.bias") for parts in norms) == 3 * MODEL.depth
    keys = [norms.pop((name, 1)) for name in grads if name.endswith("qkv.bias")]
    smallest = min(norms.values())
    assert smallest > 1e-5
    # Softmax does not see what is added to every key: what is left is rounding.
    assert max(keys) < 1e-2 * smallest


def test_verdict_of_a_different_gradient_names_it(oracle_file) -> None:
    stored = torch.load(oracle_file, weights_only=True)
    losses, groups = stored["losses"], stored["grads"]
    grads = {name: value.clone() for name, value in groups[0].items()}
    assert gate.compare(losses[0], grads, oracle_file, dp_degree=1).reason is None
    grads["blocks.0.fc2.weight"] *= 1 + 1e-4
    reason = gate.compare(losses[0], grads, oracle_file, dp_degree=1).reason
    assert reason is not None
    assert "blocks.0.fc2.weight" in reason
    assert "1e-05" in reason
