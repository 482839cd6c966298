"""Files that appear whole or not at all, also where the power goes: written aside, brought to the disk, renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """Where to write a file that is to appear at `path` when the block ends; an error leaves what was there.

    Yields:
        `.NAME.HOST-PID-RANDOM.partial/NAME` in the same folder: a folder that no other writer of `path` has, on any
        machine, and that whatever a library writes beside its file goes with.

    Raises:
        OSError: it cannot be written, brought to the disk or renamed; names `path`.
    """
    # Containers on two nodes may have one process id, and even one host name.
    writer = f"{socket.gethostname()[:20]}-{os.getpid()}-{secrets.token_hex(6)}"
    folder = path.with_name(f".{path.name}.{writer}.partial")
    partial = folder / path.name
    try:
        folder.mkdir()
        yield partial
        # A name may reach the disk before the bytes that it names.
        _sync(partial)
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        # What a write says may name no file, or the one aside; what it says of others stands.
        if error.errno is None or str(error.filename or partial) not in (str(partial), str(folder)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, that everybody may read.

    Args:
        path: the file. tensors: contiguous, on the CPU. metadata: of its header.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with published(path) as partial:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error
        # safetensors lets nobody else read; the users of a shared folder must.
        partial.chmod(0o644)


def sync_folder(folder: Path) -> None:
    """Make sure that what was created and renamed in a folder is on the disk."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
