"""The device mesh of a run: a dp x sp grid, and the same ranks as one axis for the sharding engine.

An SP group is never the default process group, even where it holds the same ranks: collectives of one group queue
behind each other, so the engine's gathers would wait for the strategy's exchanges.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from longreel.parallel.comm import is_fake, over_ranks, world


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelMesh:
    """Meshes over all ranks. SP groups are consecutive ranks, so that they stay inside a node.

    Args:
        grid: axes (`dp`, `sp`).
        flat: one axis `dp_sp` over the same ranks, which gradients are averaged and sharded over.
        ulysses_group, ring_group: names of this rank's groups within its SP group, where that is a hybrid; "" where
            not, and where the group would be of one rank.
    """

    grid: DeviceMesh
    flat: DeviceMesh
    ulysses_group: str = ""
    ring_group: str = ""

    @property
    def sp_degree(self) -> int:
        """P, ranks that share a sample."""
        return self.grid["sp"].size()

    @property
    def dp_degree(self) -> int:
        """Groups that hold different samples."""
        return self.grid["dp"].size()

    @property
    def sp_rank(self) -> int:
        """This rank's place in its SP group."""
        return self.grid["sp"].get_local_rank()

    @property
    def dp_rank(self) -> int:
        """Which SP group this rank is in."""
        return self.grid["dp"].get_local_rank()

    @property
    def sp_group(self) -> str:
        """Name of this rank's SP group, the key of the strategies' ops."""
        return self.grid["sp"].get_group().group_name


def nodes_of_ranks() -> list[int]:
    """The node of every rank of the default process group: torchrun's GROUP_RANK, or the host where a rank has none.

    Launchers that set RANK only (srun, mpirun) leave host names to tell nodes by, numbered as they first appear;
    containers on several machines must not all have the same one then. Every rank calls it.
    """
    told = [int(node) for node in over_ranks(float(os.environ.get("GROUP_RANK", -1)), world())]
    # 48 bits: exact in the fp64 numbers that ranks exchange.
    host = hashlib.blake2b(socket.gethostname().encode(), digest_size=6).digest()
    hosts = over_ranks(float(int.from_bytes(host, "big")), world())
    return told if min(told) >= 0 else [list(dict.fromkeys(hosts)).index(host) for host in hosts]


def largest_of_node(of_ranks: Sequence[float], nodes: Sequence[int]) -> int:
    """Largest sum of a node's ranks' numbers; nodes may hold different numbers of ranks."""
    return int(max(sum(n for n, at in zip(of_ranks, nodes, strict=True) if at == node) for node in set(nodes)))


def build_mesh(
    *,
    sp_degree: int,
    ulysses_degree: int | None = None,
    device_type: str = "cpu",
    nodes: Sequence[int] | None = None,
    sp_across_nodes: bool = False,
) -> ParallelMesh:
    """The mesh over all ranks of the default process group.

    Args:
        sp_degree: P; must divide the world size.
        ulysses_degree: U of a hybrid, which divides P: U consecutive ranks split heads. None: no hybrid.
        device_type: `cpu` or `cuda`.
        nodes: the node of each rank; None: all on one.
        sp_across_nodes: SP groups may lie on several nodes; the U ranks of a hybrid may not.

    Raises:
        ValueError: sp_degree does not divide the world size, or puts ranks of different nodes into one group.
    """
    world_size = dist.get_world_size()
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    if sp_degree not in divisors:
        raise ValueError(
            f"sp_degree {sp_degree} does not divide the world size {world_size}; "
            f"degrees that do: {', '.join(map(str, divisors))}"
        )
    nodes = nodes or [0] * world_size
    inside = [d for d in divisors if _inside_nodes(nodes, d)]
    if sp_degree not in inside and not sp_across_nodes:
        raise ValueError(
            f"sp_degree {sp_degree} puts ranks of different nodes into one sequence-parallel group ({len(set(nodes))} "
            f"nodes, {_per_node(nodes)} ranks each); degrees that stay inside a node: {', '.join(map(str, inside))}; "
            "--sp-across-nodes allows it (strategy usp then keeps its all-to-alls inside the nodes)"
        )
    if ulysses_degree is not None and not _inside_nodes(nodes, ulysses_degree):
        fits = [d for d in inside if sp_degree % d == 0]
        raise ValueError(
            f"ulysses_degree {ulysses_degree} puts ranks of different nodes into one all-to-all; degrees that stay "
            f"inside a node: {', '.join(map(str, fits))}; rings go across nodes"
        )
    default = dist.group.WORLD
    assert default is not None
    ranks = torch.arange(world_size).view(-1, sp_degree)
    sp = _subgroup(ranks.tolist(), device_type, "sp")
    dp = _subgroup(ranks.T.tolist(), device_type, "dp") if sp_degree > 1 else default
    groups = {}
    if ulysses_degree is not None:
        hybrid = ranks.view(-1, sp_degree // ulysses_degree, ulysses_degree)
        for axis, members in (("ulysses", hybrid.flatten(0, 1)), ("ring", hybrid.mT.flatten(0, 1))):
            size = members.shape[1]
            if size > 1:
                group = sp if size == sp_degree else _subgroup(members.tolist(), device_type, axis)
                groups[f"{axis}_group"] = group.group_name
    if device_type == "cpu" and not is_fake(world()):
        # gloo connects a group's ranks one by one: one that is done and ends would break those still at it.
        over_ranks(0.0, world())
    return ParallelMesh(
        grid=DeviceMesh.from_group([dp, sp], device_type, mesh=ranks, mesh_dim_names=("dp", "sp")),
        flat=DeviceMesh.from_group(default, device_type, mesh_dim_names=("dp_sp",)),
        **groups,
    )


def time_limit(device_type: str) -> timedelta | None:
    """How long a collective of the default group may take; None of a fake one, which has no limit.

    For groups beside it: PyTorch would give them its own default, 30 minutes on gloo.
    """
    default = dist.group.WORLD
    assert default is not None
    if is_fake(world()):
        return None
    limit: timedelta = default._get_backend(torch.device(device_type)).options._timeout
    return limit


def _subgroup(members: list[list[int]], device_type: str, axis: str) -> dist.ProcessGroup:
    """This rank's group out of those that the ranks fall into, with the time limit of the default group."""
    group, _ = dist.new_subgroups_by_enumeration(members, timeout=time_limit(device_type), group_desc=axis)
    assert group is not None
    return group


def _inside_nodes(nodes: Sequence[int], degree: int) -> bool:
    """Whether every `degree` consecutive ranks lie on one node."""
    return all(len(set(nodes[start : start + degree])) == 1 for start in range(0, len(nodes), degree))


def _per_node(nodes: Sequence[int]) -> str:
    """Ranks of a node, or of each where they differ: "8", "8, 4"."""
    counts = [nodes.count(node) for node in sorted(set(nodes))]
    return ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))
