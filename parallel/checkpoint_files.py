"""A checkpoint's files, read without trust: the digest of every one, and no pickle that could run code.

torch.distributed.checkpoint keeps its index (.metadata) and what is no tensor as pickles. Here the index is read by an
unpickler that knows the index's own classes and no others, and the rest by PyTorch's weights-only loading.
"""

from __future__ import annotations

import enum
import hashlib
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

INDEX = ".metadata"
DESCRIPTION = "run.json"

# Where the index's classes live; all of them hold data only.
_INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_INDEX_GLOBALS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}


class IndexReader(dcp.FileSystemReader):
    """torch.distributed.checkpoint's reader of folders, with the index read by a guarded unpickler."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            ValueError: it is missing, damaged, or no index.
        """
        path = Path(self.path) / INDEX
        try:
            with path.open("rb") as file:
                index = _IndexUnpickler(file).load()
        except (
            # What unpickling bytes that are no pickle, or not all of one, raises.
            pickle.UnpicklingError,
            ArithmeticError,
            AttributeError,
            EOFError,
            ImportError,
            LookupError,
            MemoryError,
            OSError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(f"{path}: missing or damaged: {one_line(error)}") from error
        if not isinstance(index, Metadata):
            raise ValueError(f"{path}: damaged: holds no index of tensors")
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class WeightsOnlyPlanner(dcp.DefaultLoadPlanner):
    """The default plan of loading, where what is no tensor is loaded by weights-only loading."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a value that is no tensor; pickle.UnpicklingError if it asks for more than weights."""
        loaded = torch.load(value, weights_only=True)
        # The parent loads pickles of any kind: it is handed one that was made here.
        again = io.BytesIO()
        torch.save(loaded, again)
        again.seek(0)
        super().load_bytes(read_item, again)


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes of an index, and dtypes; anything else that a pickle asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        plain = "." not in name
        if plain and (module in _INDEX_MODULES or (module, name) in _INDEX_GLOBALS):
            found = super().find_class(module, name)
            if module not in _INDEX_MODULES or (isinstance(found, type) and found.__module__ == module):
                return found
        elif module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which no index of tensors holds; refused")


def _enum_member(kind: Any, name: str) -> Any:
    """What getattr() is asked for by a pickle of Python 3.11.0 to 3.11.3: a member of an enumeration."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"asks for the attribute {name} of {kind}, which no index of tensors holds; refused")


def file_digests(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files; OSError if one cannot be read."""
    digests = {}
    for name in names:
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write run.json with a digest of itself, and make sure that it is on the disk."""
    text = json.dumps(description | {"digest": description_digest(description)}, indent=1) + "\n"
    with (folder / DESCRIPTION).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def description_digest(description: dict[str, Any]) -> str:
    """SHA-256 of all of a description but its digest."""
    rest = {key: value for key, value in description.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def one_line(error: BaseException) -> str:
    """The reason of the first rank that failed, in one line."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300] or type(error).__name__
