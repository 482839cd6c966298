"""The device mesh of a run: a dp x sp grid, and the same ranks as one axis for the sharding engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longreel.parallel.comm import group_size, over_ranks


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
    """The node of every rank of the default process group, as torchrun's GROUP_RANK says; one node without it.

    Every rank calls it.
    """
    world = dist.group.WORLD
    assert world is not None
    return [int(node) for node in over_ranks(float(os.environ.get("GROUP_RANK", 0)), world.group_name)]


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
    grid = init_device_mesh(device_type, (world_size // sp_degree, sp_degree), mesh_dim_names=("dp", "sp"))
    flat = init_device_mesh(device_type, (world_size,), mesh_dim_names=("dp_sp",))
    groups = {}
    if ulysses_degree is not None:
        shape = world_size // sp_degree, sp_degree // ulysses_degree, ulysses_degree
        hybrid = init_device_mesh(device_type, shape, mesh_dim_names=("dp", "ring", "ulysses"))
        groups = {f"{axis}_group": hybrid[axis].get_group().group_name for axis in ("ulysses", "ring")}
        groups = {name: group for name, group in groups.items() if group_size(group) > 1}
    return ParallelMesh(grid=grid, flat=flat, **groups)


def _inside_nodes(nodes: Sequence[int], degree: int) -> bool:
    """Whether every `degree` consecutive ranks lie on one node."""
    return all(len(set(nodes[start : start + degree])) == 1 for start in range(0, len(nodes), degree))


def _per_node(nodes: Sequence[int]) -> str:
    """Ranks of a node, or of each where they differ: "8", "8, 4"."""
    counts = [nodes.count(node) for node in sorted(set(nodes))]
    return ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))
