"""longreel.parallel.agreement: what ranks must hold alike, and the one error of all of them where they do not."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from longreel.parallel.agreement import check_agreement
from longreel.parallel.mesh import build_mesh
from longreel.parallel.predict.fake_world import fake_world


def said(by_rank: list[list[int]], sp_degree: int) -> str:
    """The error of this rank, "" for none; afterwards the group still works."""
    mesh = build_mesh(sp_degree=sp_degree)
    message = ""
    try:
        check_agreement("cu_seqlens", by_rank[dist.get_rank()], mesh.sp_group)
    except ValueError as error:
        message = str(error)
    check_agreement("nothing", [], mesh.sp_group)
    return message


@pytest.mark.parametrize("degree", [2, 4], ids=lambda p: f"P{p}")
def test_the_same_values_pass(run_distributed, degree):
    assert run_distributed(said, degree, [[0, 3, 2**40, -1]] * degree, degree) == [""] * degree


@pytest.mark.parametrize(
    ("by_rank", "told"),
    [
        pytest.param([[0, 5, 9], [0, 5, 8]], "rank 0: [0, 5, 9]; rank 1: [0, 5, 8]", id="P2"),
        pytest.param([[0, 9]] * 3 + [[0, 8]], "ranks 0, 1, 2: [0, 9]; rank 3: [0, 8]", id="P4"),
        pytest.param([[0, 9], [0, 4, 9]], "rank 0: [0, 9]; rank 1: [0, 4, 9]", id="another-number"),
        pytest.param([[0, 9], [], [0, 9], [0]], "ranks 0, 2: [0, 9]; rank 1: []; rank 3: [0]", id="empty"),
        # As text both are "1" and "12"-like beginnings: lengths and separators count.
        pytest.param([[1, 12], [11, 2]], "rank 0: [1, 12]; rank 1: [11, 2]", id="same-digits"),
        pytest.param([[2**70], [2**70 + 1]], f"rank 0: [{2**70}]; rank 1: [{2**70 + 1}]", id="beyond-64-bits"),
    ],
)
def test_a_difference_is_one_error_of_every_rank(run_distributed, by_rank, told):
    began = time.monotonic()
    messages = run_distributed(said, len(by_rank), by_rank, len(by_rank), timeout=30.0)
    assert time.monotonic() - began < 25
    expected = f"cu_seqlens differ between the {len(by_rank)} ranks of a group, which must hold the same: {told}"
    assert messages == [expected] * len(by_rank)


def test_long_sequences_show_where_they_differ(run_distributed):
    long = list(range(0, 30_000, 10))
    message = run_distributed(said, 2, [long, [*long[:2000], 20_001, *long[2001:]]], 2)[0]
    assert len(message) < 400
    assert "20000, 20010" in message.partition("; rank 1")[0]
    assert "20001, 20010" in message.partition("; rank 1")[2]
    assert "(3000 values, from index 1994)" in message


def test_groups_agree_for_themselves(run_distributed):
    messages = run_distributed(said, 4, [[1], [1], [2], [3]], 2)
    assert messages[:2] == ["", ""]
    assert all("rank 0: [2]; rank 1: [3]" in message for message in messages[2:])


def test_a_fake_group_has_nothing_to_compare():
    with fake_world(4):
        check_agreement("cu_seqlens", [0, 1], build_mesh(sp_degree=4).sp_group)
