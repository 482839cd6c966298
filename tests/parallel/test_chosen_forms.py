"""What `auto` takes by length: chunks of heads, and FastSeq's attention on the chunks that are there."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from longreel.models.sequence import SequenceLengths
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.predict.fake_world import fake_world
from longreel.parallel.strategies import build_strategy, fastseq, fastseq_attention, usp
from longreel.parallel.strategies.fastseq import ATTENTION_FROM
from longreel.parallel.strategies.usp import CHUNKS_FROM

HEADS, HEAD_DIM = 16, 1
WIDTH = HEADS * HEAD_DIM
# dQ, dK and dV in fp32: 2 samples of 16 tokens, a quarter of the heads.
SUMS_BYTES = 4 * 2 * 16 * 3 * WIDTH // 4


class Asked(Exception):
    """Ends a layer at its op, with what the op was asked for."""


def asked_for(strategy: str, degree: int, rows: int, batch: int = 1, **options: Any) -> dict[str, Any]:
    """Arguments, by name, that the op of a layer of `rows` tokens a rank is called with."""
    module, op = {
        "fastseq": (fastseq, "fastseq_attention_op"),
        "ulysses": (usp, "exchange_attention_op"),
        "usp": (usp, "exchange_attention_op"),
    }[strategy]
    names = [argument.name for argument in getattr(module, op)._opoverload._schema.arguments]

    def ask(*args: Any) -> tuple[Tensor, ...]:
        raise Asked(dict(zip(names, args, strict=True)))

    lengths = SequenceLengths(valid=rows * degree, padded=rows * degree)
    x, qkv = torch.zeros(batch, rows, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
    with fake_world(degree), mock.patch.object(module, op, ask):
        config = ParallelConfig(strategy=strategy, sp_degree=degree, attention_provider="torch", **options)
        sp = build_strategy(config, build_mesh(sp_degree=degree, ulysses_degree=config.ulysses_degree))
        with pytest.raises(Asked) as asked:
            sp.self_attention(x, qkv, num_heads=HEADS, lengths=lengths)
    found: dict[str, Any] = asked.value.args[0]
    return found


@pytest.mark.parametrize(
    ("strategy", "degree", "options", "chunks"),
    [
        # The most that divides a rank's heads, up to four.
        pytest.param("ulysses", 2, {}, 4, id="ulysses-8-heads"),
        pytest.param("ulysses", 8, {}, 2, id="ulysses-2-heads"),
        pytest.param("ulysses", 16, {}, 1, id="ulysses-1-head"),
        pytest.param("usp", 8, {"ulysses_degree": 2}, 4, id="usp-8-heads"),
        pytest.param("usp", 8, {"ulysses_degree": 1}, 1, id="usp-no-exchange"),
        pytest.param("ulysses", 2, {"head_chunks": 2}, 2, id="asked-for"),
    ],
)
def test_head_chunks_are_taken_from_long_sequences(strategy, degree, options, chunks):
    assert asked_for(strategy, degree, CHUNKS_FROM, **options)["chunks"] == chunks
    short = asked_for(strategy, degree, CHUNKS_FROM - 1, **options)["chunks"]
    assert short == options.get("head_chunks", 1)


def test_head_chunks_of_several_samples_are_not_taken():
    assert asked_for("ulysses", 2, CHUNKS_FROM, batch=2)["chunks"] == 1


@pytest.mark.parametrize(
    ("overlap", "short", "long"),
    [("auto", False, True), ("projection", False, False), ("attention", True, True)],
    ids=["auto", "projection", "attention"],
)
def test_attention_on_chunks_is_taken_from_long_ones(overlap, short, long):
    assert asked_for("fastseq", 2, ATTENTION_FROM - 1, fastseq_overlap=overlap)["chunked"] is short
    assert asked_for("fastseq", 2, ATTENTION_FROM, fastseq_overlap=overlap)["chunked"] is long
    # One rank has nothing to wait for.
    assert asked_for("fastseq", 1, ATTENTION_FROM, fastseq_overlap=overlap)["chunked"] is False


@pytest.mark.parametrize(
    ("policy", "degree", "limit", "chunked"),
    [
        pytest.param("none", 2, 0, True, id="none"),
        pytest.param("keep_attention", 4, SUMS_BYTES, True, id="lean-small"),
        pytest.param("keep_attention", 4, SUMS_BYTES - 1, False, id="lean-large"),
        pytest.param("keep_attention", 2, 1 << 60, False, id="lean-two-ranks"),
    ],
)
def test_a_lean_backward_goes_by_chunks_while_its_sums_are_small(policy, degree, limit, chunked):
    x, qkv = torch.zeros(2, 4, WIDTH, dtype=torch.bfloat16, requires_grad=True), nn.Linear(WIDTH, 3 * WIDTH).bfloat16()
    with (
        fake_world(degree),
        mock.patch.object(fastseq_attention, "LEAN_SUMS_BYTES", limit),
        mock.patch.object(
            fastseq_attention, "attend_project_backward", wraps=fastseq_attention.attend_project_backward
        ) as by_chunks,
    ):
        config = ParallelConfig(
            strategy="fastseq", sp_degree=degree, attention_provider="torch", fastseq_overlap="attention", policy=policy
        )
        sp = build_strategy(config, build_mesh(sp_degree=degree))
        lengths = SequenceLengths(valid=4 * degree - 1, padded=4 * degree)
        out = sp.self_attention(x, qkv, num_heads=HEADS, lengths=lengths)
        out.backward(torch.zeros_like(out))
    assert by_chunks.called is chunked
