"""A pool of worker processes that run one function on every rank of a group: for tests and sweeps.

Starting a process costs seconds (it imports torch), so workers live on; each call gets a fresh process group. A
worker that dies, hangs or raises costs its own call only: the pool replaces the workers at the next call. Ctrl-C and
SIGTERM are the parent's business: workers end with it, however it ends, and the last of them cleans up.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from longreel.data.processes import end_with_parent, exit_code, start_child

# After one rank has failed, the others get this long to report the same before they are ended.
GRACE_S = 2.0
# Between two looks at a call that may be overdue.
LOOK_S = 1.0
# Until all workers of a call must have taken it up.
START_S = 3600.0
# Back ends of the workers' groups. With NCCL each rank has a GPU of its own; what lies in host memory goes by gloo.
GLOO, NCCL = "gloo", "cpu:gloo,cuda:nccl"


class WorkerError(RuntimeError):
    """A distributed call failed; the message names the rank and carries its traceback."""


class WorkerTimeout(WorkerError):
    """A distributed call outlived its time limit and its workers were ended."""


class WorkerPool:
    """Up to max_workers processes; run() uses the first world_size of them.

    Args:
        max_workers: processes at most; each is started when first needed.
        num_threads: torch threads of each worker.
        backend: of the groups: GLOO, or NCCL where each rank has a GPU.
    """

    def __init__(self, max_workers: int, *, num_threads: int = 1, backend: str = GLOO) -> None:
        if max_workers < 1:
            raise ValueError(f"max_workers must be at least 1, got {max_workers}")
        self._max_workers = max_workers
        self._num_threads = num_threads
        self._backend = backend
        self._workers: dict[int, tuple[BaseProcess, Connection]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="longreel-workers-")
        self._calls = 0

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def scratch(self) -> Path:
        """A folder for files of calls, there as long as the pool."""
        return Path(self._folder.name)

    def close(self) -> None:
        """End all workers."""
        self._end(list(self._workers))
        self._folder.cleanup()

    def run(
        self,
        fn: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 120.0,
        overdue: Callable[[], str | None] = lambda: None,
    ) -> list[Any]:
        """Call fn(*args) on every rank of a new gloo group of world_size; returns the results by rank.

        Args:
            fn: a module-level function; it finds the group as the default one.
            world_size: ranks, at most max_workers.
            args: sent to every rank by pickle.
            timeout: seconds for the call, the start of new workers not included.
            overdue: asked about every second while the call runs; what it says, if anything, ends it as a timeout does.

        Raises:
            ValueError: world_size is not within the pool.
            WorkerTimeout: the call outlived timeout, or was overdue; its workers were ended.
            WorkerError: a rank raised or died; the message holds its rank and traceback.
        """
        if not 1 <= world_size <= self._max_workers:
            raise ValueError(f"world_size must be 1 to {self._max_workers} (max_workers), got {world_size}")
        ranks = range(world_size)
        for rank in ranks:
            if rank not in self._workers or not self._workers[rank][0].is_alive():
                self._start(rank)
        self._calls += 1
        rendezvous = str(self.scratch / f"rendezvous-{self._calls}")
        call = (_locate(fn), args, world_size, rendezvous, timeout, self._backend)
        try:
            for rank in ranks:
                self._workers[rank][1].send((rank, *call))
            replies = self._collect(set(ranks), timeout, overdue)
        except BaseException:
            # Some ranks may still be in a collective that nobody will answer.
            self._end(list(ranks))
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(rendezvous)
        return [replies[rank] for rank in ranks]

    def _start(self, rank: int) -> None:
        self._end([rank])
        self._workers[rank] = start_child(_serve, self._num_threads, self._folder.name)

    def _end(self, ranks: list[int]) -> None:
        ended = [self._workers.pop(rank) for rank in ranks if rank in self._workers]
        for process, connection in ended:
            connection.close()
            process.kill()
        for process, _ in ended:
            process.join()

    def _collect(self, pending: set[int], timeout: float, overdue: Callable[[], str | None]) -> dict[int, Any]:
        started = dict.fromkeys(pending, False)
        replies: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + START_S
        while pending:
            by_connection = {self._workers[rank][1]: rank for rank in pending}
            ready = wait(list(by_connection), timeout=max(0.0, min(deadline - time.monotonic(), LOOK_S)))
            if not ready:
                if failures and time.monotonic() >= deadline:
                    break
                if not failures and (late := overdue()) is not None:
                    raise WorkerTimeout(late)
                if time.monotonic() < deadline:
                    continue
                raise WorkerTimeout(
                    f"ranks {sorted(pending)} of {len(started)} did not finish within {timeout:g} s and were ended"
                )
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = by_connection[connection]
                try:
                    status, value = connection.recv()
                except (EOFError, OSError):
                    pending.discard(rank)
                    code = exit_code(self._workers[rank][0])
                    failures[rank] = f"rank {rank} of {len(started)} died with exit code {code}"
                    continue
                if status == "started":
                    started[rank] = True
                    if all(started.values()):
                        # Gloo gives up after the same time; the parent waits a little longer to hear its reason.
                        deadline = time.monotonic() + timeout + GRACE_S
                    continue
                pending.discard(rank)
                if status == "ok":
                    replies[rank] = value
                else:
                    failures[rank] = f"rank {rank} of {len(started)} failed:\n{value}"
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            told = [failures[rank] for rank in sorted(failures)]
            if pending:
                told.append(f"ranks {sorted(pending)} of {len(started)} had not finished and were ended")
            raise WorkerError("\n".join(told))
        return replies


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """One call of WorkerPool.run on workers of its own."""
    with WorkerPool(world_size) as pool:
        return pool.run(fn, world_size, *args, timeout=timeout)


def _locate(fn: Callable[..., Any]) -> tuple[str, str | None, str]:
    """Module name, its file and the function's name: enough to find fn in a process that shares no imports."""
    if "<" in fn.__qualname__:
        raise ValueError(f"fn must be a module-level function, got {fn.__qualname__}")
    module = sys.modules[fn.__module__]
    return fn.__module__, getattr(module, "__file__", None), fn.__qualname__


def _load(module_name: str, file: str | None, qualname: str) -> Callable[..., Any]:
    """The function, by its module's name if that is importable here, else by its file (test modules are not)."""
    if module_name.split(".")[0] == "longreel" or file is None:
        module = importlib.import_module(module_name)
    else:
        # A name of its own, so that a script's `if __name__ == "__main__"` stays quiet.
        name = f"_longreel_worker_{file}"
        if name not in sys.modules:
            sys.modules[name] = _execute(name, file)
        module = sys.modules[name]
    return getattr(module, qualname)


def _execute(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _serve(connection: Connection, num_threads: int, folder: str) -> None:
    """Worker main loop: one call per message until the pool closes the pipe."""
    # Also of a parent that was killed: in its place the pool's folder is removed.
    end_with_parent(lambda: shutil.rmtree(folder, ignore_errors=True))
    import torch

    torch.set_num_threads(num_threads)
    # The pool may be gone at any message.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            call = connection.recv()
            connection.send(("started", None))
            connection.send_bytes(_answer(*call))


def _answer(
    rank: int,
    located: tuple[str, str | None, str],
    args: tuple[Any, ...],
    world_size: int,
    rendezvous: str,
    timeout: float,
    backend: str,
) -> memoryview:
    """("ok", result) of one call on this rank, or ("error", traceback), as Connection.recv reads it."""
    import torch
    import torch.distributed as dist

    try:
        fn = _load(*located)
        if backend == NCCL:
            # Ranks beyond the GPUs compute on the CPU.
            torch.cuda.set_device(rank % torch.cuda.device_count())
        dist.init_process_group(
            backend,
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        # A rank that is done before its peers have connected would take their connections with it.
        dist.barrier()
        try:
            value = fn(*args)
        finally:
            dist.destroy_process_group()
        return ForkingPickler.dumps(("ok", value))
    except BaseException:  # noqa: BLE001 - the parent raises it again with the rank's name
        return ForkingPickler.dumps(("error", traceback.format_exc()))
