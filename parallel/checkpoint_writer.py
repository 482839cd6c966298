"""Writes checkpoints while training goes on: complete or absent, the last few and the best one kept.

The state is copied to host memory; a thread with a process group of its own then writes it to `.step-000200.partial`,
digests what is on the disk, and renames the folder when every rank is done. A process that dies at any moment leaves
either the whole checkpoint or none, and those before it as they were.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import DeviceMesh

from longreel.models.publish import sync_folder
from longreel.parallel.checkpoint import VERSION, checkpoints, read_description
from longreel.parallel.checkpoint_files import (
    INDEX,
    file_digests,
    one_line,
    write_description,
)
from longreel.parallel.comm import all_gather_objects
from longreel.parallel.mesh import time_limit

# A disk with fewer bytes left is full: what was written last did not fit.
_NO_SPACE = 1 << 20


class CheckpointWriter:
    """Every rank has one; save() and close() are called by all of them.

    Args:
        folder: `checkpoints/` of the run. mesh: one axis over all ranks.
        keep: newest checkpoints kept. keep_best: the one of the lowest score is kept beside them.
        background: write in a thread; without it save() returns when the checkpoint is there.
    """

    def __init__(
        self,
        folder: Path,
        mesh: DeviceMesh,
        *,
        keep: int,
        keep_best: bool = False,
        background: bool = True,
    ) -> None:
        self._folder, self._mesh = folder, mesh
        self._keep, self._keep_best = keep, keep_best
        self._background = background
        self._first = mesh.get_local_rank() == 0
        # Collectives of a thread on the group of training would mix with those of the steps.
        self._group = dist.new_group(backend="gloo", timeout=time_limit("cpu"), group_desc="checkpoints")
        cuda = mesh.device_type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._disk_full = False
        self.saved: Path | None = None
        self._remarks: list[str] = []

    def save(self, step: int, state: dict[str, Any], config: dict[str, Any], *, score: float | None = None) -> None:
        """Copy a state and have it written; waits for the checkpoint before, if that is still being written.

        Args:
            step: optimizer steps done. state: for torch.distributed.checkpoint, see Engine.state().
            config: the resolved configuration of the run, for JSON.
            score: what the best checkpoint is lowest in.

        Raises:
            OSError: this one (without `background`) could not be written, or the one before, which nobody had wait()ed
                for: then this one is being written all the same. The others are intact.
        """
        before = self._join()
        staged = self._stager.stage(state)
        assert isinstance(staged, dict)
        description = {"version": VERSION, "step": step, "score": score, "config": config}
        if not self._background:
            self._write(step, staged, description)
            self.wait()
        else:
            self._thread = threading.Thread(
                target=self._write, args=(step, staged, description), name="longreel-checkpoint", daemon=True
            )
            self._thread.start()
        self._report(before)

    def wait(self) -> None:
        """Return once nothing is being written; OSError if that failed."""
        self._report(self._join())

    def remarks(self) -> list[str]:
        """What went wrong beside the writing since the last call, on the first rank; after wait()."""
        said, self._remarks = self._remarks, []
        return said

    def _join(self) -> BaseException | None:
        """What went wrong in the thread, once it is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        return failure

    def _report(self, failure: BaseException | None) -> None:
        if isinstance(failure, OSError | dcp.api.CheckpointException):
            reason = one_line(failure)
            if self._disk_full and "No space left" not in reason:
                reason = f"No space left on the disk ({reason})"
            raise OSError(f"{self._folder}: cannot write the checkpoint: {reason}") from failure
        if failure is not None:
            raise failure

    def close(self) -> None:
        """wait(), and give up what is held."""
        try:
            self.wait()
        finally:
            self._stager.close()

    def _write(self, step: int, staged: dict[str, Any], description: dict[str, Any]) -> None:
        """In the thread; what goes wrong is kept for wait()."""
        final, partial = self._folder / f"step-{step:06d}", self._folder / f".step-{step:06d}.partial"
        try:
            # The first rank's work: another's new folder would fall to the removal of an old one.
            self._together(lambda: make_anew(partial) if self._first else None)
            with warnings.catch_warnings():
                # PyTorch's own internals use names that it deprecates.
                warnings.simplefilter("ignore", FutureWarning)
                # All is in host memory: nothing to copy ahead, for which it would wait for streams of this thread's
                # device, the first of the node, and there behind the steps that are enqueued.
                writer = dcp.FileSystemWriter(partial, per_thread_copy_ahead=0)
                dcp.save(staged, storage_writer=writer, process_group=self._group)
            names = [path.name for path in sorted(partial.glob(f"__{self._mesh.get_local_rank()}_*"))]
            names += [INDEX] if self._first else []
            digests = self._together(lambda: file_digests(partial, names))
            files = {name: digest for part in digests for name, digest in part.items()}
            self._together(lambda: self._publish(partial, final, description | {"files": files}))
            self.saved = final
        except BaseException as error:  # noqa: BLE001 - wait() raises it in the thread that trains
            self._failure = error
            with contextlib.suppress(OSError):
                # PyTorch's writer says where it was, not why.
                self._disk_full = shutil.disk_usage(self._folder).free < _NO_SPACE
            if self._first:
                # Room for the next one: a full disk may be why this one failed.
                shutil.rmtree(partial, ignore_errors=True)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """The results of all ranks' work; OSError on every rank if that of one failed."""
        result, problem = None, None
        try:
            result = work()
        except OSError as error:
            problem = str(error)
        everyone = all_gather_objects((result, problem), self._group.group_name)
        if problems := [said for _, said in everyone if said is not None]:
            raise OSError(problems[0])
        return [part for part, _ in everyone]

    def _publish(self, partial: Path, final: Path, description: dict[str, Any]) -> None:
        """Describe and rename; the first rank's work."""
        if not self._first:
            return
        write_description(partial, description)
        sync_folder(partial)
        aside = final.with_name(f".{final.name}.replaced")
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        partial.rename(final)
        sync_folder(self._folder)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            prune_checkpoints(self._folder, self._keep, keep_best=self._keep_best)
        except OSError as error:
            # This checkpoint is there all the same; the next save tries again.
            self._remarks.append(f"{self._folder}: old checkpoints cannot be removed: {error}")


def make_anew(folder: Path) -> None:
    """An empty folder, whatever was there before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def prune_checkpoints(folder: Path, keep: int, *, keep_best: bool = False) -> None:
    """Delete all but the newest `keep` checkpoints and, with keep_best, the one of the lowest score."""
    found = checkpoints(folder)
    for aside in folder.glob(".step-*.pruned"):
        shutil.rmtree(aside)
    scores = [(score, path) for path in found if keep_best and (score := _score(path)) is not None]
    best = {min(scores)[1]} if scores else set()
    for path in found[:-keep]:
        if path not in best:
            # Gone in one step, as it came.
            aside = path.with_name(f".{path.name}.pruned")
            path.rename(aside)
            shutil.rmtree(aside)


def remove_unfinished(folder: Path) -> None:
    """Delete what a run that was killed left half written or half deleted; one rank calls it.

    A checkpoint that was to be replaced, and was not, gets its name back.
    """
    for aside in folder.glob(".step-*.replaced"):
        final = folder / aside.name[1:].removesuffix(".replaced")
        if not final.exists():
            aside.rename(final)
    for pattern in (".step-*.partial", ".step-*.pruned", ".step-*.replaced"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _score(checkpoint: Path) -> float | None:
    try:
        score = read_description(checkpoint).get("score")
    except ValueError:
        return None
    return float(score) if isinstance(score, int | float) else None
