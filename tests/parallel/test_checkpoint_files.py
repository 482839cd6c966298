"""longreel.parallel.checkpoint_files: index and description are read; what is neither is refused, and not run."""

from __future__ import annotations

import enum
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorProperties

from longreel.parallel.checkpoint import read_run
from longreel.parallel.checkpoint_files import IndexReader, WeightsOnlyPlanner
from longreel.parallel.checkpoint_writer import CheckpointWriter
from longreel.parallel.launch import process_group
from longreel.parallel.mesh import build_mesh


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with process_group():
        writer = CheckpointWriter(tmp_path / "checkpoints", build_mesh(sp_degree=1).flat, keep=1, background=False)
        writer.save(1, {"weights": torch.randn(3, 4), "steps": 1}, {})
        writer.close()
    return tmp_path / "checkpoints" / "step-000001"


class Harmful:
    """Pickled, a call of os.mkdir."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"\x80\x04", b"not a pickle\n" * 50, pickle.dumps({"no": "index"}), bytes(range(256))],
    ids=["empty", "word", "cut", "text", "another-pickle", "bytes"],
)
def test_damaged_index_is_refused_without_a_log(saved: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (saved / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"step-000001/\.metadata: (missing or )?damaged: \S") as raised:
        IndexReader(saved).read_metadata()
    assert "\n" not in str(raised.value)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_an_index_written_by_an_early_python_3_11_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = IndexReader(saved).read_metadata()
    # There members of an enumeration are pickled as their attribute of it.
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", lambda member, _: (getattr, (type(member), member.name)))
    content = pickle.dumps(index)
    monkeypatch.undo()
    assert b"getattr" in content
    (saved / ".metadata").write_bytes(content)
    assert IndexReader(saved).read_metadata().state_dict_metadata == index.state_dict_metadata


class Attribute:
    """Pickled, what a class of the index has and is no member of an enumeration."""

    def __reduce__(self) -> Any:
        return getattr, (TensorProperties, "create_from_tensor")


def test_other_attributes_are_refused(saved: Path) -> None:
    (saved / ".metadata").write_bytes(pickle.dumps(Attribute()))
    with pytest.raises(ValueError, match=r"asks for the attribute create_from_tensor of .*TensorProperties.*; refused"):
        IndexReader(saved).read_metadata()


def test_a_pickle_that_runs_code_is_refused_and_not_run(saved: Path, tmp_path: Path) -> None:
    (saved / ".metadata").write_bytes(pickle.dumps(Harmful(str(tmp_path / "made"))))
    with pytest.raises(ValueError, match=r"asks for posix\.mkdir, which no index of tensors holds; refused"):
        IndexReader(saved).read_metadata()
    value = io.BytesIO()
    torch.save(Harmful(str(tmp_path / "made")), value)
    value.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        WeightsOnlyPlanner().load_bytes(None, value)  # type: ignore[arg-type]
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", r"run.json: damaged: expected an object, got \[\]"),
        ('{"version": 2}', "run.json: damaged: digest is missing"),
        ('{"version": 2, "step": 1, "config": {}, "files": {}, "digest": "0"}', "damaged: its text is not what"),
        ('{"version": 99, "step": 1, "config": {}}', "checkpoint version 99, this version reads 2"),
        (None, r"not a checkpoint, run\.json is missing"),
    ],
    ids=["cut", "list", "keys", "digest", "version", "missing"],
)
def test_damaged_description_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)
