"""Files that appear whole or not at all, also where the power goes: written aside, brought to the disk, renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """Where to write a file that is to appear at `path` when the block ends; an error leaves what was there.

    Yields:
        `.NAME.HOST-PID-RANDOM.partial` in the same folder, which no other writer of `path` has, on any machine.

    Raises:
        OSError: it cannot be brought to the disk or renamed.
    """
    # Containers on two nodes may have one process id, and even one host name.
    writer = f"{socket.gethostname()[:20]}-{os.getpid()}-{secrets.token_hex(6)}"
    partial = path.with_name(f".{path.name}.{writer}.partial")
    try:
        yield partial
        # A name may reach the disk before the bytes that it names.
        _sync(partial)
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make sure that what was created and renamed in a folder is on the disk."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
