"""Child processes that talk over a pipe each, and work shared out to several of them.

The pools of the standard library share queues between their processes: one that is killed can leave a lock behind, and
one that is killed while others start leaves the pool waiting for ever. A pipe of its own ends with its process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class ProcessDied(OSError):
    """A process ended, or was killed, before its work was done."""


def start_child(target: Callable[..., None], *args: Any) -> tuple[BaseProcess, Connection]:
    """Start a process that shares nothing with this one but a pipe.

    A terminal's Ctrl-C goes to children too, which would each print where they were: they start with it blocked.

    Args:
        target: called in it with its end of the pipe, then args; a function of a module. args: sent by pickle, and
            small: one that is killed before it has read more than a pipe holds would be waited for.

    Returns:
        The process and this end of the pipe, which reads EOFError once the process has gone.
    """
    # A forked child would inherit locks of PyTorch's and FFmpeg's threads.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *args), daemon=True)
    # The tracker of multiprocessing, started with the first child, would lift the block: it has to run before.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    there.close()
    return process, here


def end_with_parent(clean: Callable[[], object] = lambda: None) -> None:
    """End this child as soon as its parent has ended, even if that was killed.

    Args:
        clean: called before.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        clean()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def shared_out(
    make: Callable[..., Callable[[Item], Result]], args: tuple[Any, ...], items: Iterable[Item], *, processes: int
) -> Iterator[Result]:
    """Results of items, worked off one at a time by each of several processes.

    Args:
        make: called with args once in every process: what it returns works off an item. A function of a module.
        args, items: sent by pickle. processes: how many, at least 1.

    Yields:
        Results, as they are ready.

    Raises:
        ProcessDied: one of the processes was killed.
        Exception: what make or an item raised, with its traceback there as a note. All processes end with it.
    """
    children: dict[Connection, BaseProcess] = {}
    left = iter(items)
    try:
        for _ in range(processes):
            process, connection = start_child(_serve)
            children[connection] = process
        busy = set(children)
        for connection in children:
            # What make returned is the first reply; its items come after it.
            _send(connection, (make, args), children)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                connection = ready
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionError) as error:
                    raise _death(children[connection]) from error
                if kind == "error":
                    raise value
                for item in left:
                    _send(connection, item, children)
                    break
                else:
                    busy.discard(connection)
                if kind == "result":
                    yield value
    finally:
        for connection, process in children.items():
            connection.close()
            process.kill()
        for process in children.values():
            process.join()


def _send(connection: Connection, value: Any, children: dict[Connection, BaseProcess]) -> None:
    try:
        connection.send(value)
    except ConnectionError as error:
        raise _death(children[connection]) from error


def _death(process: BaseProcess) -> ProcessDied:
    process.join()
    return ProcessDied(f"a process ended before its work was done, with exit code {process.exitcode}")


def _serve(connection: Connection) -> None:
    end_with_parent()
    # The parent may want no more at any message.
    with contextlib.suppress(EOFError, ConnectionError):
        make, args = connection.recv()
        kind, work = _tried("ready", make, *args)
        connection.send((kind, None if kind == "ready" else work))
        while kind != "error":
            kind, value = _tried("result", work, connection.recv())
            connection.send((kind, value))


def _tried(kind: str, fn: Callable[..., Any], *args: Any) -> tuple[str, Any]:
    """(kind, what fn returned), or ("error", what it raised)."""
    try:
        return kind, fn(*args)
    except Exception as error:  # noqa: BLE001 - raised in the parent
        error.add_note(traceback.format_exc())
        return "error", error
