"""The device mesh of a run: a dp x sp grid, and the same ranks as one axis for the sharding engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longreel.parallel.comm import group_size


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


def build_mesh(*, sp_degree: int, ulysses_degree: int | None = None, device_type: str = "cpu") -> ParallelMesh:
    """The mesh over all ranks of the default process group.

    Args:
        sp_degree: P; must divide the world size.
        ulysses_degree: U of a hybrid, which divides P: U consecutive ranks split heads. None: no hybrid.
        device_type: `cpu` or `cuda`.

    Raises:
        ValueError: sp_degree does not divide the world size.
    """
    world_size = dist.get_world_size()
    if sp_degree < 1 or world_size % sp_degree:
        works = [d for d in range(1, world_size + 1) if world_size % d == 0]
        raise ValueError(
            f"sp_degree {sp_degree} does not divide the world size {world_size}; "
            f"degrees that do: {', '.join(map(str, works))}"
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
