"""Reading a folder that data/prepare.py made: clips by index, every byte checked."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import Tensor

from longreel.data.samples import Clip
from longreel.data.shard_files import (
    DATASET,
    FORMAT,
    INDEX,
    NULL_TEXT,
    SHARDS,
    ShardError,
    checksum,
    from_stored,
    read_rows,
)
from longreel.data.shard_reader import TensorFile

# Of an open shard only the header is in memory.
_OPEN_SHARDS = 64


class ShardDataset:
    """A ClipSource of prepared clips; indices are those of index.parquet. May be read from several threads.

    Args:
        folder: what data/prepare.py wrote, finished. verify: check each clip against its checksum when it is read.

    Attributes:
        info: dataset.json. rows: index.parquet. sizes: (T', H', W') of each clip. channels: C.
        tokens: patches of each clip, at the patch size that it was prepared for.
        null_text: features [L, text_dim] of the empty caption, or None where captions are not encoded yet.

    Raises:
        ShardError: the folder is not prepared, not finished, or a file of it is damaged; names the file.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        self.verify = verify
        try:
            self.info: dict[str, Any] = json.loads((folder / DATASET).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ShardError(f"{folder}: holds no {DATASET}; prepare it with data/prepare.py") from error
        except ValueError as error:
            raise ShardError(f"{folder / DATASET}: not JSON: {error}") from error
        if not isinstance(self.info, dict) or self.info.get("format") != FORMAT:
            raise ShardError(f"{folder / DATASET}: not of format {FORMAT}; prepare the folder again")
        if not (folder / INDEX).is_file():
            raise ShardError(f"{folder}: not finished, it holds no {INDEX}; run the same data/prepare.py command again")
        self.rows, notes = read_rows(folder / INDEX)
        if notes.get("fingerprint") != self.info["fingerprint"]:
            raise ShardError(
                f"{folder / INDEX}: belongs to another preparation than {DATASET}; prepare the folder again"
            )
        if not self.rows:
            raise ShardError(f"{folder}: holds no clip; its summary.json says why")
        self.channels: int = self.info["channels"]
        self.sizes = [(row["latent_frames"], row["latent_height"], row["latent_width"]) for row in self.rows]
        self.tokens: list[int] = [row["tokens"] for row in self.rows]
        self.null_text: Tensor | None = None
        if self.info["text_stored"]:
            try:
                self.null_text = TensorFile(folder / NULL_TEXT).tensor("text").float()
            except (OSError, ValueError) as error:
                raise ShardError(f"{folder / NULL_TEXT}: cannot be read: {error}") from error
        self._shards: OrderedDict[str, TensorFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        """See ClipSource: over rows and checksums, so over every byte of the clips."""
        listing = hashlib.blake2b(digest_size=7)
        for row in self.rows:
            listing.update(repr((row["path"], row["start"], row["frames"], row["captions"], row["checksum"])).encode())
        return listing.hexdigest()

    def __getitem__(self, index: int) -> Clip:
        """See ClipSource.

        Raises:
            ShardError: the shard is missing or damaged; names it and the clip.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        row = self.rows[index]
        latents = self._tensor(index, row["key"])
        text = None if row["text_key"] is None else self._tensor(index, row["text_key"])
        if self.verify and checksum(latents, text) != row["checksum"]:
            raise ShardError(f"{self._path(index)}: damaged: clip {index} ({row['path']}) does not match its checksum")
        return Clip(
            latents=from_stored(latents),
            captions=tuple(row["captions"]),
            text=None if text is None else text.float(),
            fps=row["fps"],
            source=row["path"],
            start=row["start"],
        )

    def video(self, index: int) -> None:
        """See ClipSource: clips are stored."""
        return

    def captions(self, index: int) -> tuple[str, ...]:
        """See ClipSource."""
        return tuple(self.rows[index]["captions"])

    def check(self) -> None:
        """Read every clip against its checksum; ShardError names the first shard that is missing or damaged."""
        verify, self.verify = self.verify, True
        try:
            for index in range(len(self)):
                self[index]
        finally:
            self.verify = verify

    def _path(self, index: int) -> Path:
        return self.folder / SHARDS / self.rows[index]["shard"]

    def _tensor(self, index: int, key: str) -> Tensor:
        path = self._path(index)
        try:
            return self._opened(path).tensor(key)
        except FileNotFoundError as error:
            raise ShardError(f"{path}: no such file; clip {index} is in it") from error
        except (OSError, ValueError) as error:
            raise ShardError(f"{path}: damaged: clip {index} cannot be read: {' '.join(str(error).split())}") from error

    def _opened(self, path: Path) -> TensorFile:
        with self._lock:
            name = path.name
            opened = self._shards.pop(name, None) or TensorFile(path)
            self._shards[name] = opened
            while len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
            return opened
