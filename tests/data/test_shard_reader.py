"""data/shard_reader.py: what safetensors wrote comes back to the byte; a file that shrinks or fails gives an error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longreel.data.shard_reader import TensorFile


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        str(dtype): torch.randn(3, 5, 7, generator=generator).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    return made | {
        "bytes": torch.randint(0, 256, (2, 9), dtype=torch.uint8, generator=generator),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }


@pytest.fixture
def path(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    save_file(tensors, tmp_path / "some.safetensors")
    return tmp_path / "some.safetensors"


@pytest.mark.parametrize("piece", [None, 3], ids=["whole", "in-pieces"])
def test_every_dtype_and_shape_comes_back(
    tensors: dict[str, torch.Tensor], path: Path, piece: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv
    # A system call may read less than was asked for.
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: whole(file, [buffers[0][:piece]], at))
    file = TensorFile(path)
    for key, tensor in tensors.items():
        read = file.tensor(key)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_a_file_that_is_cut_off_while_open(tensors: dict[str, torch.Tensor], path: Path) -> None:
    file = TensorFile(path)
    header = json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")
    last = max(header, key=lambda key: header[key]["data_offsets"][1])
    os.truncate(path, path.stat().st_size - 1)
    for key in tensors.keys() - {last}:
        assert torch.equal(file.tensor(key), tensors[key])
    with pytest.raises(ValueError, match=r"it is \d+ bytes long where \d+ are needed"):
        file.tensor(last)


def test_a_file_that_is_cut_off_during_a_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TensorFile(path)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(ValueError, match="it ends 18 bytes early"):
        file.tensor("bytes")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is 0 bytes long where 8 are needed"),
        ((1 << 60).to_bytes(8, "little"), "its header says that it is 1152921504606846976 bytes long"),
        ((9).to_bytes(8, "little") + b"{}", "it is 10 bytes long where 17 are needed"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not a JSON object"),
        ((2).to_bytes(8, "little") + b"\xff}", "decode"),
    ],
    ids=["empty", "length", "short", "list", "bytes"],
)
def test_damaged_headers(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        TensorFile(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype":"F32","shape":[2],"data_offsets":[0,9]}',
        '{"dtype":"F32","shape":[-2],"data_offsets":[8,0]}',
        '{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}',
        '{"dtype":"F33","shape":[2],"data_offsets":[0,8]}',
        '{"dtype":"F32","shape":[2],"data_offsets":[0]}',
        '{"dtype":"F32","shape":2,"data_offsets":[0,8]}',
        "7",
    ],
)
def test_damaged_entries(tmp_path: Path, entry: str) -> None:
    header = f'{{"a":{entry}}}'.encode()
    (tmp_path / "bad.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    file = TensorFile(tmp_path / "bad.safetensors")
    for key in ("a", "b"):
        with pytest.raises(ValueError, match=f"its header has no readable entry '{key}'"):
            file.tensor(key)


def test_files_are_closed_with_the_last_reference(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files = [TensorFile(path) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    del files
    assert len(os.listdir("/proc/self/fd")) == before
