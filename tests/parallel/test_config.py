"""longreel.parallel.config: what a wrong degree is told, by the name of the argument that is wrong."""

from __future__ import annotations

import pytest

from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.parallelize import ParallelDiT
from longreel.parallel.predict.fake_world import fake_world


@pytest.mark.parametrize(
    ("strategy", "sp_degree", "ulysses_degree", "told"),
    [
        ("ulysses", 6, None, "sp_degree 6; degrees that work: 1, 2, 4, 8; strategy ring takes any"),
        ("fastseq", 3, None, "sp_degree 3; degrees that work: 1, 2, 4, 8; strategy ring takes any"),
        # A degree of the hybrid divides the heads and the ranks of a sequence.
        ("usp", 6, 3, "ulysses_degree 3; degrees that work: 1, 2; strategy ring takes any"),
        ("usp", 12, 6, "ulysses_degree 6; degrees that work: 1, 2, 4; strategy ring takes any"),
    ],
)
def test_heads_that_do_not_divide_name_the_argument(strategy, sp_degree, ulysses_degree, told):
    config = ParallelConfig(strategy=strategy, sp_degree=sp_degree, ulysses_degree=ulysses_degree)
    model = DiT(DiTConfig(depth=1, hidden_size=64, num_heads=8))
    with fake_world(sp_degree), pytest.raises(ValueError, match="num_heads 8 does not divide by") as caught:
        ParallelDiT(model, build_mesh(sp_degree=sp_degree, ulysses_degree=ulysses_degree), config)
    assert str(caught.value) == f"num_heads 8 does not divide by {told}"


@pytest.mark.parametrize(("strategy", "ulysses_degree"), [("ring", None), ("usp", 1)])
def test_rings_take_any_heads(strategy, ulysses_degree):
    ParallelConfig(strategy=strategy, sp_degree=3, ulysses_degree=ulysses_degree).check_heads(8)
