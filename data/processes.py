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
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

# How long a process may take to end once its pipe has.
_GRACE_S = 5.0

Item = TypeVar("Item")
Result = TypeVar("Result")


class ProcessDied(OSError):
    """A process ended, or was killed, before its work was done; exit_code is minus the signal's number if it was."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a process ended before its work was done, with exit code {exit_code}")
        self.exit_code = exit_code


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


def exit_code(process: BaseProcess) -> int:
    """Of a child whose pipe has ended; one that lives on without it is killed."""
    deadline = time.monotonic() + _GRACE_S
    # join would wait for ever for one that has closed what it is waited for by.
    while process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


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
        ProcessDied: one of the processes ended or was killed.
        Exception: what make or an item raised, with its traceback there as a note; where it cannot be sent a
            RuntimeError that says it. All processes end with it.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
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
                except (EOFError, OSError) as end:
                    raise ProcessDied(exit_code(children[connection])) from end
                if kind == "error":
                    error, told = value
                    error.add_note(told)
                    raise error
                for item in left:
                    _send(connection, item, children)
                    break
                else:
                    # It ends, and its memory is free for the others.
                    connection.close()
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
        raise ProcessDied(exit_code(children[connection])) from error


def _serve(connection: Connection) -> None:
    end_with_parent()
    # The parent may want no more at any message.
    with contextlib.suppress(EOFError, ConnectionError):
        make, args = connection.recv()
        work: Any = None

        def begin() -> None:
            nonlocal work
            work = make(*args)

        reply, failed = _reply("ready", begin)
        connection.send_bytes(reply)
        while not failed:
            reply, failed = _reply("result", work, connection.recv())
            connection.send_bytes(reply)


def _reply(kind: str, fn: Callable[..., Any], *args: Any) -> tuple[memoryview, bool]:
    """(kind, what fn returned) or ("error", (what it raised, traceback)), as recv reads it; whether it is an error."""
    try:
        return ForkingPickler.dumps((kind, fn(*args))), False
    except Exception as error:  # noqa: BLE001 - raised in the parent
        told = traceback.format_exc()
        try:
            reply = ForkingPickler.dumps(("error", (error, told)))
            # Some can be sent and not be read.
            ForkingPickler.loads(reply)
        except Exception:  # noqa: BLE001 - any class of exception may stand there
            reply = ForkingPickler.dumps(("error", (RuntimeError(f"{type(error).__name__}: {error}"), told)))
        return reply, True
