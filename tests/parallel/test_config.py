"""longreel.parallel.config: what a wrong degree is told, by the name of the argument that is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.models.sequence import SequenceLengths
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.parallelize import ParallelDiT
from longreel.parallel.predict.fake_world import fake_world
from longreel.parallel.strategies import build_strategy

WRONG_DEGREES = pytest.mark.parametrize(
    ("strategy", "sp_degree", "ulysses_degree", "told"),
    [
        ("ulysses", 6, None, "sp_degree 6; degrees that work: 1, 2, 4, 8; strategy ring takes any"),
        ("fastseq", 3, None, "sp_degree 3; degrees that work: 1, 2, 4, 8; strategy ring takes any"),
        # A degree of the hybrid divides the heads and the ranks of a sequence.
        ("usp", 6, 3, "ulysses_degree 3; degrees that work: 1, 2; strategy ring takes any"),
        ("usp", 12, 6, "ulysses_degree 6; degrees that work: 1, 2, 4; strategy ring takes any"),
    ],
)


@WRONG_DEGREES
def test_heads_that_do_not_divide_name_the_argument(strategy, sp_degree, ulysses_degree, told):
    config = ParallelConfig(strategy=strategy, sp_degree=sp_degree, ulysses_degree=ulysses_degree)
    model = DiT(DiTConfig(depth=1, hidden_size=64, num_heads=8))
    with fake_world(sp_degree), pytest.raises(ValueError, match="num_heads 8 does not divide by") as caught:
        ParallelDiT(model, build_mesh(sp_degree=sp_degree, ulysses_degree=ulysses_degree), config)
    assert str(caught.value) == f"num_heads 8 does not divide by {told}"


@WRONG_DEGREES
def test_a_strategy_by_itself_says_the_same(strategy, sp_degree, ulysses_degree, told):
    config = ParallelConfig(strategy=strategy, sp_degree=sp_degree, ulysses_degree=ulysses_degree)
    lengths = SequenceLengths(valid=sp_degree, padded=sp_degree)
    with fake_world(sp_degree):
        sp = build_strategy(config, build_mesh(sp_degree=sp_degree, ulysses_degree=ulysses_degree))
        with pytest.raises(ValueError, match="num_heads 8 does not divide by") as caught:
            sp.self_attention(torch.zeros(1, 1, 64), nn.Linear(64, 192), num_heads=8, lengths=lengths)
    assert str(caught.value) == f"num_heads 8 does not divide by {told}"


@pytest.mark.parametrize(("strategy", "ulysses_degree"), [("ring", None), ("usp", 1)])
def test_rings_take_any_heads(strategy, ulysses_degree):
    ParallelConfig(strategy=strategy, sp_degree=3, ulysses_degree=ulysses_degree).check_heads(8)
