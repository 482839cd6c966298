"""The fake process group comes and goes, and never beside a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from longreel.parallel.predict.fake_world import fake_world


def test_world_is_there_inside_and_gone_after() -> None:
    with fake_world(8, rank=3):
        assert (dist.get_world_size(), dist.get_rank(), dist.get_backend()) == (8, 3, "fake")
    assert not dist.is_initialized()


def test_world_is_gone_after_an_error() -> None:
    with pytest.raises(KeyError), fake_world(2):
        raise KeyError
    assert not dist.is_initialized()


def test_a_real_group_is_refused_and_left_alone(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"a process group \(gloo, 1 ranks\) is initialised"), fake_world(4):
            pass
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()


def test_rank_outside_the_world_is_named() -> None:
    with pytest.raises(ValueError, match="rank 4 is not one of a world of 4; use 0 to 3"), fake_world(4, rank=4):
        pass


def test_no_result_of_one_world_is_taken_for_another_ranks() -> None:
    """PyTorch remembers what DTensor ops gave, with the mesh, which is equal to that of other ranks."""
    offsets = []
    for rank in (0, 1):
        with fake_world(2, rank=rank):
            mesh = init_device_mesh("cpu", (2,))
            whole = DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(0)])
            again = whole.detach().clone()
            offsets.append(again.device_mesh.get_coordinate())
    assert offsets == [(0,), (1,)]
