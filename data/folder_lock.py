"""One writer of a folder at a time, whatever becomes of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def only_writer(folder: Path, lock: str, command: str) -> Iterator[None]:
    """Hold a folder while the block runs.

    The lock is the kernel's: it goes with the process, however that ends. The file beside it only says whose it is.

    Args:
        folder: one that exists. lock: name of the lock file in it. command: of this process, for others to be told.

    Raises:
        ValueError: at once, where another process holds it: names process and command.
        OSError: the file cannot be opened, or this file system has no locks.
    """
    path = folder / lock
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"out: {folder} is being written by {_holder(file.read())}; give another --out") from None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "command": command}))
        file.flush()
        yield
        # The file stays: one that another process has just opened must not be another file than the one locked.
        file.truncate(0)


def _holder(text: str) -> str:
    try:
        told = json.loads(text)
        return f"process {told['pid']} ({told['command']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
