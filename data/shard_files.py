"""The files of a prepared folder: shards of latents in safetensors, rows about them in Parquet.

dataset.json          how it was made; ShardDataset reads it first
index.parquet         one row per clip, in order (COLUMNS)
null_text.safetensors features of the empty caption, where text is encoded
shards/GGGGG-SS.safetensors   latents `clip.N`, text features `text.N`
parts/GGGGG.parquet   rows of one group of videos, while the folder is being prepared and after
summary.json, contact_sheet.png
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longreel.models.publish import publish_tensors, published

DATASET, INDEX, NULL_TEXT, SUMMARY, SHEET = (
    "dataset.json",
    "index.parquet",
    "null_text.safetensors",
    "summary.json",
    "contact_sheet.png",
)
SHARDS, PARTS = "shards", "parts"
FORMAT = 1

# Columns of the index: name, Parquet type, meaning.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("path", "string", "video, relative to its folder"),
    ("captions", "list<string>", "all of them, whole"),
    ("start", "int64", "first frame of the clip in the video"),
    ("frames", "int32", "frames of the clip"),
    ("fps", "float64", "its frames per second"),
    ("height", "int32", "pixels"),
    ("width", "int32", "pixels"),
    ("latent_frames", "int32", "T' of the latents"),
    ("latent_height", "int32", "H'"),
    ("latent_width", "int32", "W'"),
    ("tokens", "int64", "patches of the clip"),
    ("shard", "string", "file in shards/"),
    ("key", "string", "latents in the shard"),
    ("text_key", "string", "text features in the shard, or null"),
    ("checksum", "string", "BLAKE2b-128 of the latents' and the text features' bytes"),
)


class ShardError(ValueError):
    """A prepared folder that cannot be used; the one-line message names the file."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredClip:
    """A clip on its way into a shard: its row of the index, without shard, keys and checksum, and its tensors.

    Args:
        latents: as stored: uint8 for raw pixels, else of the chosen dtype. text: [captions, L, text_dim], or None.
    """

    row: dict[str, Any]
    latents: Tensor
    text: Tensor | None


def from_stored(stored: Tensor) -> Tensor:
    """Latents in fp32; bytes are pixels in [-1, 1]."""
    return stored.float() / 127.5 - 1.0 if stored.dtype == torch.uint8 else stored.float()


def checksum(latents: Tensor, text: Tensor | None) -> str:
    """32 hex digits over dtype, shape and bytes of both."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (latents, *([] if text is None else [text])):
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_shard(folder: Path, name: str, clips: Sequence[StoredClip]) -> list[dict[str, Any]]:
    """Write clips into shards/name, whole or not at all.

    Args:
        folder: the prepared folder. clips: in order; text features that follow each other and are the same tensor are
            stored once.

    Returns:
        Their whole rows.

    Raises:
        OSError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    rows = []
    text, text_key = None, None
    for number, clip in enumerate(clips):
        key = f"clip.{number:05d}"
        tensors[key] = clip.latents.contiguous()
        if clip.text is None:
            text, text_key = None, None
        elif clip.text is not text:
            text, text_key = clip.text, f"text.{number:05d}"
            tensors[text_key] = text.contiguous()
        rows.append(
            clip.row | {"shard": name, "key": key, "text_key": text_key, "checksum": checksum(clip.latents, clip.text)}
        )
    publish_tensors(folder / SHARDS / name, tensors)
    return rows


def shard_is_whole(path: Path) -> bool:
    """Whether a shard is there and as long as its header says; its bytes are compared when clips are read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def write_rows(path: Path, rows: Sequence[dict[str, Any]], notes: dict[str, Any] | None = None) -> None:
    """Write rows of the index as Parquet and notes in its metadata; whole or not at all, the same bytes each time."""
    import pyarrow
    import pyarrow.parquet

    kinds = {"list<string>": pyarrow.list_(pyarrow.string())}
    fields = [pyarrow.field(name, kinds.get(kind) or pyarrow.type_for_alias(kind)) for name, kind, _ in COLUMNS]
    metadata = {"longreel": json.dumps(notes or {}, sort_keys=True)}
    table = pyarrow.Table.from_pylist(list(rows), schema=pyarrow.schema(fields, metadata=metadata))
    with published(path) as partial:
        pyarrow.parquet.write_table(table, partial, compression="zstd", write_page_checksum=True)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, notes) that write_rows wrote; ShardError names a file that is missing or damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, page_checksum_verification=True)
        notes = json.loads((table.schema.metadata or {})[b"longreel"])
        rows = table.select([name for name, _, _ in COLUMNS]).to_pylist()
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such file") from error
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise ShardError(
            f"{path}: damaged or not written by data/prepare.py: {' '.join(str(error).split())}"
        ) from error
    return rows, notes


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with published(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
