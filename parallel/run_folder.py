"""The folder that a run writes: one run at a time, and nothing in it of what an earlier one left half done."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from longreel.data.folder_lock import only_writer
from longreel.parallel.broken_clips import BROKEN_CLIPS
from longreel.parallel.checkpoint import checkpoints as list_checkpoints
from longreel.parallel.checkpoint_writer import remove_unfinished
from longreel.parallel.comm import all_gather_objects
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.resume import Earlier, set_aside
from longreel.parallel.shared_folder import check_shared, check_writable

LOCK = ".train.lock"


def enter_run_folder(
    out: Path,
    checkpoints: Path,
    mesh: ParallelMesh,
    earlier: Earlier,
    resume: bool,
    say: Callable[[str], None],
) -> ExitStack:
    """Make a folder this run's; every rank calls it, the first one writes.

    Args:
        out: of the run, created if needed. checkpoints: in it. mesh: over all ranks.
        earlier: what was found there; checkpoints newer than the one to go on from are damaged. resume: whether the run
            goes on at all.
        say: hears where a file system has no locks.

    Returns:
        What gives the folder up when it is closed.

    Raises:
        ValueError: on every rank: another process writes there, or has since `earlier` was found; or it is not one
            folder for all ranks.
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
        if problem is None:
            remove_unfinished(checkpoints)
            now = list_checkpoints(checkpoints)
            if now != earlier.seen:
                names = ", ".join(path.name for path in now) or "none"
                problem = (
                    f"out: another run has written {out} while this one was starting: its checkpoints now are {names}; "
                    "start again, with --resume to go on from them"
                )
    if (said := all_gather_objects(problem, mesh.flat.get_group().group_name)[0]) is not None:
        lock.close()
        raise ValueError(said)
    if first and earlier.checkpoint is not None:
        set_aside(earlier.checkpoint, checkpoints)
    if first and not resume:
        # Of a run that left no checkpoint, which this one is not.
        (out / BROKEN_CLIPS).unlink(missing_ok=True)
    return lock
