"""Tensors of a safetensors file, read without mapping it.

A mapped file that is cut off, or lies on a disk that fails, kills the process that touches it (SIGBUS); a read gives an
error. The format: 8 bytes with the header's length, little-endian; the header, JSON: {key: {"dtype", "shape",
"data_offsets": [begin, end]}}; the bytes, which offsets count from their start (huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What shards hold.
_DTYPES = {"U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# As safetensors has it: a damaged length must not ask for all memory.
_LONGEST_HEADER = 100_000_000


class TensorFile:
    """An open safetensors file; may be read from several threads, and is closed when nothing refers to it.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be opened or read.
        ValueError: its header is damaged, or the file is shorter than that; says what is wrong, not which file.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        length = int.from_bytes(self._read(0, 8).numpy().tobytes(), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"its header says that it is {length} bytes long")
        header = json.loads(self._read(8, length).numpy().tobytes())
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        self._header: dict[str, Any] = header
        self._start = 8 + length

    def tensor(self, key: str) -> Tensor:
        """The tensor of that name, in memory of its own.

        Raises:
            OSError: it cannot be read.
            ValueError: there is none, its entry is damaged, or the file ends before it does.
        """
        try:
            entry = self._header[key]
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            fits = begin >= 0 and min(shape, default=0) >= 0 and end - begin == math.prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its header has no readable entry {key!r}") from error
        if not fits:
            raise ValueError(f"its header has no readable entry {key!r}")
        return self._read(self._start + begin, end - begin).view(dtype).reshape(shape)

    def _read(self, at: int, count: int) -> Tensor:
        # A header may ask for more than there is, which must not be allocated.
        if (there := os.fstat(self._descriptor).st_size) < at + count:
            raise ValueError(f"it is {there} bytes long where {at + count} are needed")
        content = torch.empty(count, dtype=torch.uint8)
        left = content.numpy().data
        while left:
            read = os.preadv(self._descriptor, [left], at)
            if not read:
                raise ValueError(f"it ends {len(left)} bytes early")
            left, at = left[read:], at + read
        return content
