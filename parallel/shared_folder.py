"""Whether a folder is the same one on every rank: checkpoints of several nodes need a file system that they share."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path

import torch

from longreel.parallel.comm import all_gather
from longreel.parallel.mesh import ParallelMesh


def check_shared(folder: Path, mesh: ParallelMesh) -> None:
    """Check that a file which the first rank writes is there for all; every rank calls it.

    Its name is drawn anew: network file systems may remember for seconds that a name was not there.

    Args:
        folder: one that exists on every rank.
        mesh: over all ranks.

    Raises:
        ValueError: some ranks do not see the file: on every rank, naming them.
        OSError: the first rank cannot write it.
    """
    group, device = mesh.flat.get_group().group_name, mesh.flat.device_type
    first = mesh.flat.get_rank() == 0
    token = torch.tensor([secrets.randbits(62) if first else 0], device=device)
    number = int(all_gather(token, group)[0])
    path = folder / f".shared-{number:016x}"
    if first:
        path.touch()
    try:
        # Also the moment by which the file is written.
        all_gather(token, group).tolist()
        seen = all_gather(torch.tensor([path.exists()], device=device), group).flatten().tolist()
    finally:
        if first:
            path.unlink(missing_ok=True)
    if not all(seen):
        missing = ", ".join(str(rank) for rank, there in enumerate(seen) if not there)
        raise ValueError(
            f"out: {folder} is not one folder for all ranks: ranks {missing} do not see what rank 0 writes; put it on "
            "a file system that all nodes share"
        )


def check_writable(folder: Path) -> None:
    """Create a folder if needed and make sure that files can be written there; OSError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder}: cannot be written: {error.strerror}") from error
