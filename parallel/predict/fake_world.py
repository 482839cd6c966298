"""The fake process group: one process stands for one rank of N, and every collective returns at once.

The only file that touches torch.testing._internal.distributed.fake_pg and DTensor's cache, private APIs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

# Batches of sends and receives look the back end up by their tensors' device (longreel.parallel.predict.shapes).
if "meta" not in dist.Backend.backend_capability["fake"]:
    dist.Backend.backend_capability["fake"].append("meta")


@contextmanager
def fake_world(world_size: int, *, rank: int = 0) -> Iterator[None]:
    """Make this process rank `rank` of a fake default process group, and take the group down at the end.

    Collectives inside move nothing and give wrong values: only shapes, memory and counts mean something. Build meshes
    inside this context but outside FakeTensorMode.

    Args:
        world_size: ranks that there would be.
        rank: the one that this process plays.

    Raises:
        ValueError: a process group is initialised already, or rank is not one of the world's.
    """
    if dist.is_initialized():
        raise ValueError(
            f"a process group ({dist.get_backend()}, {dist.get_world_size()} ranks) is initialised: prediction needs a "
            "fake one of its own; predict in another process, or after destroy_process_group()"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of a world of {world_size}; use 0 to {world_size - 1}")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # It imports the compiler, nearly a second that commands which predict nothing need not take.
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        # What DTensor ops gave is remembered with the mesh it lay on, which a mesh of as many ranks is equal to, be it
        # another rank's: a run that was planned here would give every rank the place of the one played.
        _clear_sharding_prop_cache()
