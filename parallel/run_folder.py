"""The folder that a run writes: one run at a time, and nothing in it of what an earlier one left half done."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from longreel.data.folder_lock import only_writer
from longreel.parallel.broken_clips import BROKEN_CLIPS
from longreel.parallel.checkpoint_writer import remove_unfinished
from longreel.parallel.comm import all_gather_objects
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.resume import set_aside
from longreel.parallel.shared_folder import check_shared, check_writable

LOCK = ".train.lock"


def enter_run_folder(
    out: Path,
    checkpoints: Path,
    mesh: ParallelMesh,
    resumed: Path | None,
    resume: bool,
    say: Callable[[str], None],
) -> ExitStack:
    """Make a folder this run's; every rank calls it, the first one writes.

    Args:
        out: of the run, created if needed. checkpoints: in it. mesh: over all ranks.
        resumed: the checkpoint that the run goes on from; newer ones are damaged. resume: whether it goes on at all.
        say: hears where a file system has no locks.

    Returns:
        What gives the folder up when it is closed.

    Raises:
        ValueError: on every rank: another process writes there, or it is not one folder for all ranks.
        OSError: it cannot be written.
    """
    check_writable(out)
    if checkpoints.exists():
        check_writable(checkpoints)
    check_shared(out, mesh)
    first, lock = mesh.flat.get_rank() == 0, ExitStack()
    problem = None
    if first:
        try:
            lock.enter_context(only_writer(out, LOCK, shlex.join(sys.argv)))
        except ValueError as error:
            problem = str(error)
        except OSError as error:
            say(f"warning: {out} cannot be locked ({error.strerror}); let no other run write there")
    if (said := all_gather_objects(problem, mesh.flat.get_group().group_name)[0]) is not None:
        raise ValueError(said)
    if first and checkpoints.exists():
        remove_unfinished(checkpoints)
        if resumed is not None:
            set_aside(resumed, checkpoints)
    if first and not resume:
        # Of a run that left no checkpoint, which this one is not.
        (out / BROKEN_CLIPS).unlink(missing_ok=True)
    return lock
