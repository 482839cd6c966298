"""longreel.parallel.mesh: which ranks share a sequence, and that they do so inside a node unless told otherwise."""

from __future__ import annotations

import os
import socket
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from longreel.parallel.mesh import build_mesh, largest_of_node, nodes_of_ranks
from longreel.parallel.predict.fake_world import fake_world

TWO_NODES = [0] * 4 + [1] * 4


def ranks_of(name: str) -> list[int]:
    return dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(name))


@pytest.mark.parametrize("rank", range(8))
def test_usp_across_nodes_has_its_all_to_alls_inside_and_its_rings_across(rank):
    with fake_world(8, rank=rank):
        mesh = build_mesh(sp_degree=8, ulysses_degree=4, nodes=TWO_NODES, sp_across_nodes=True)
        node, place = divmod(rank, 4)
        assert ranks_of(mesh.ulysses_group) == [4 * node + i for i in range(4)]
        assert ranks_of(mesh.ring_group) == [place, place + 4]
        assert ranks_of(mesh.sp_group) == list(range(8))


@pytest.mark.parametrize("rank", [0, 3, 6])
def test_sp_groups_lie_inside_nodes(rank):
    with fake_world(8, rank=rank):
        mesh = build_mesh(sp_degree=4, nodes=TWO_NODES)
        assert ranks_of(mesh.sp_group) == [4 * (rank // 4) + i for i in range(4)]
        assert ranks_of(mesh.grid["dp"].get_group().group_name) == [rank % 4, rank % 4 + 4]


@pytest.mark.parametrize(
    ("nodes", "degree", "told"),
    [
        pytest.param(TWO_NODES, 8, r"2 nodes, 4 ranks each\); degrees that stay inside a node: 1, 2, 4;", id="whole"),
        pytest.param([0] * 3 + [1] * 3 + [2] * 2, 2, r"3 nodes, 3, 3, 2 ranks each\); .* node: 1;", id="uneven"),
        pytest.param([0] * 6 + [1] * 2, 4, r"2 nodes, 6, 2 ranks each\); .* inside a node: 1, 2;", id="some-inside"),
    ],
)
def test_a_degree_that_crosses_nodes_needs_the_switch(nodes, degree, told):
    with fake_world(8):
        with pytest.raises(ValueError, match=f"sp_degree {degree} puts ranks of different nodes .*{told}"):
            build_mesh(sp_degree=degree, nodes=nodes)
        assert build_mesh(sp_degree=degree, nodes=nodes, sp_across_nodes=True).sp_degree == degree


def test_a_hybrids_heads_stay_inside_a_node_whatever_is_allowed():
    with (
        fake_world(8),
        pytest.raises(ValueError, match=r"ulysses_degree 8 puts .* into one all-to-all; .* inside a node: 1, 2, 4"),
    ):
        build_mesh(sp_degree=8, ulysses_degree=8, nodes=TWO_NODES, sp_across_nodes=True)


def test_without_a_launcher_all_ranks_are_on_one_node():
    with fake_world(8):
        assert build_mesh(sp_degree=8).sp_degree == 8


def groups_as_built(sp_degree: int, ulysses_degree: int | None) -> dict[str, tuple[str, str]]:
    """Name and time limit of every group of the mesh, and of the default one."""
    mesh = build_mesh(sp_degree=sp_degree, ulysses_degree=ulysses_degree)
    names = {"sp": mesh.sp_group, "dp": mesh.grid["dp"].get_group().group_name, "default": dist.group.WORLD.group_name}
    names |= {"flat": mesh.flat.get_group().group_name, "ulysses": mesh.ulysses_group, "ring": mesh.ring_group}
    found = {}
    for axis, name in names.items():
        group = dist.distributed_c10d._resolve_process_group(name) if name else None
        limit = group._get_backend(torch.device("cpu")).options._timeout if group else None
        found[axis] = (name, str(limit))
    return found


@pytest.mark.parametrize(("degree", "ulysses_degree"), [(2, None), (4, 2), (4, 4)])
def test_every_group_has_the_time_limit_of_the_default_one(run_distributed, degree, ulysses_degree):
    for groups in run_distributed(groups_as_built, 4, degree, ulysses_degree, timeout=77.0):
        limits = {axis: limit for axis, (name, limit) in groups.items() if name}
        assert limits == dict.fromkeys(limits, "0:01:17")


def test_exchanges_never_share_a_group_with_the_engine(run_distributed):
    for degree in (1, 2, 4):
        for groups in run_distributed(groups_as_built, 4, degree, None):
            assert groups["flat"][0] == groups["default"][0] != groups["sp"][0]


def test_a_hybrid_of_one_axis_takes_the_sp_group():
    with fake_world(8):
        mesh = build_mesh(sp_degree=4, ulysses_degree=4)
        assert (mesh.ulysses_group, mesh.ring_group) == (mesh.sp_group, "")
        mesh = build_mesh(sp_degree=4, ulysses_degree=1)
        assert (mesh.ulysses_group, mesh.ring_group) == ("", mesh.sp_group)


def nodes_as_launched() -> list[int]:
    os.environ["GROUP_RANK"] = str(dist.get_rank() // 2)
    try:
        return nodes_of_ranks()
    finally:
        del os.environ["GROUP_RANK"]


def test_nodes_are_the_launchers(run_distributed):
    assert run_distributed(nodes_as_launched, 4) == [[0, 0, 1, 1]] * 4
    assert run_distributed(nodes_of_ranks, 2) == [[0, 0]] * 2


def nodes_on_hosts(hosts: list[str], told: list[str | None]) -> list[int]:
    """What a rank finds whose host and GROUP_RANK are those at its place."""
    node = told[dist.get_rank()]
    environment = {} if node is None else {"GROUP_RANK": node}
    with (
        mock.patch.object(socket, "gethostname", return_value=hosts[dist.get_rank()]),
        mock.patch.dict(os.environ, environment),
    ):
        return nodes_of_ranks()


def test_hosts_are_nodes_where_the_launcher_names_none(run_distributed):
    hosts = ["node9", "node9", "node1", "node1"]
    assert run_distributed(nodes_on_hosts, 4, hosts, [None] * 4) == [[0, 0, 1, 1]] * 4
    # Two launchers on one host are two nodes; a rank without one puts all on hosts.
    assert run_distributed(nodes_on_hosts, 4, ["one"] * 4, ["0", "0", "1", "1"]) == [[0, 0, 1, 1]] * 4
    assert run_distributed(nodes_on_hosts, 4, hosts, ["0", "0", "0", None]) == [[0, 0, 1, 1]] * 4


@pytest.mark.parametrize(
    ("nodes", "largest"), [([0, 0, 0, 1], 6), ([0, 1, 1, 1], 9), ([0, 1, 0, 1], 6), ([0] * 4, 10), ([0, 1, 2, 3], 4)]
)
def test_nodes_may_hold_different_numbers_of_ranks(nodes, largest):
    assert largest_of_node([1.0, 2.0, 3.0, 4.0], nodes) == largest


def a_sequence_over_hosts() -> None:
    nodes = nodes_on_hosts(["node9", "node9", "node1", "node1"], [None] * 4)
    build_mesh(sp_degree=4, nodes=nodes)


def test_a_sequence_over_hosts_needs_the_switch_without_torchrun(run_distributed):
    with pytest.raises(RuntimeError, match="sp_degree 4 puts ranks of different nodes into one"):
        run_distributed(a_sequence_over_hosts, 4)
