"""longreel.bench.traffic: what is counted, and when it disagrees with the formula."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from longreel.bench.traffic import counted_traffic, disagreement, formula
from longreel.models.config import DiTConfig
from longreel.models.sequence import AttentionShape, Traffic
from longreel.parallel import comm


class Strategy:
    def traffic(self, shape: AttentionShape) -> Traffic:
        return Traffic(forward={"all_to_all": 10, "all_gather": 1}, backward={"all_to_all": 20, "reduce_scatter": 3})


def sent(policy: str = "none", **model: object) -> dict[str, int]:
    config = DiTConfig(**({"depth": 3, "hidden_size": 16, "num_heads": 2, "conditioning": "cross"} | model))
    return formula(Strategy(), config, batch=1, seq_len=8, element_size=4, policy=policy)


def test_formula_counts_forward_twice_when_it_is_recomputed() -> None:
    assert sent() == {"all_to_all": 90, "all_gather": 3, "reduce_scatter": 9}
    assert sent("full")["all_to_all"] == 120


def test_formula_counts_the_attention_layers_that_exchange() -> None:
    assert sent(text_only=True) == {}
    assert sent(text_only=True, cross_layout="published") == sent()
    assert sent(cross_layout="published") == {name: 2 * count for name, count in sent().items()}


@pytest.mark.parametrize(
    ("counted", "agrees"),
    [
        ({"sequence.all_to_all": 5, "sequence.send": 7, "sharding.all_gather": 99}, True),
        ({"sequence.all_to_all": 5, "sequence.send": 3, "sequence.all_gather": 4}, True),
        ({"sequence.all_to_all": 5}, False),
        ({"sequence.all_to_all": 12}, False),
        ({"sequence.all_to_all": 5, "sequence.send": 8}, False),
    ],
    ids=["engine-apart", "gather-as-either", "nothing-gathered", "same-sum-elsewhere", "one-byte-more"],
)
def test_disagreement_compares_by_kind(counted, agrees) -> None:
    assert (disagreement(counted, {"all_to_all": 5, "all_gather": 4, "reduce_scatter": 3}) is None) == agrees


def send_everything() -> dict[str, int]:
    """One collective of each kind through comm and one of the engine's (in a worker)."""
    group = dist.group.WORLD.group_name
    x = torch.zeros(2, 8)
    with counted_traffic() as sent:
        comm.all_to_all(x, group)
        comm.all_gather(x, group)
        comm.reduce_scatter(x, group)
        comm.all_reduce_sum(x, group)
        comm.start_exchange(x, torch.empty_like(x), step=1, group=group).wait()
        dist.all_reduce(x)
    comm.all_gather(x, group)
    return dict(sent)


def test_every_collective_is_counted_once_where_it_belongs(run_distributed) -> None:
    for sent in run_distributed(send_everything, 2):
        assert sent == {
            "sequence.all_to_all": 32,
            "sequence.all_gather": 64,
            "sequence.reduce_scatter": 32,
            "sequence.all_reduce": 64,
            "sequence.send": 64,
            "sharding.all_reduce": 64,
        }
