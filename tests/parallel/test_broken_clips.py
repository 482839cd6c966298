"""Clips that break while a run trains: left out on every rank and after a resume alike, or all is saved and it ends."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from longreel.data.cutting import CutConfig
from longreel.data.demo import make_demo_folder
from longreel.data.native_clips import NativeClips
from longreel.data.prepare_config import PrepareConfig
from longreel.data.prepare_run import prepare
from longreel.data.video import VideoError, VideoInfo
from longreel.models.text import TextEncoderConfig
from longreel.parallel.broken_clips import BROKEN_CLIPS, BrokenClips, LostClips, known_videos
from longreel.parallel.checkpoint_writer import CheckpointWriter
from longreel.parallel.config import ParallelConfig
from longreel.parallel.launch import process_group
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.trainer import Trainer

RED = "red_square_right.mp4"
TEXT = TextEncoderConfig(text_dim=8, max_text_tokens=6)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    make_demo_folder(tmp_path / "videos", num_frames=8, size=16)
    return tmp_path / "videos"


def run(folder: Path, **choices: Any) -> TrainConfig:
    fields: dict[str, Any] = {"videos": folder, "native_sizes": True, "num_frames": 4, "token_budget": 64} | choices
    return TrainConfig(
        out=folder.parent / "run",
        model=ModelChoice(depth=1, hidden_size=32, num_heads=4, conditioning="in_context", patch_size=(2, 4, 4)),
        steps=12,
        checkpoint_every=4,
        keep=9,
        parallel=ParallelConfig(precision="fp64", strategy="ulysses", sp_degree=2),
        **({"batch_size": 2, "text": TEXT} | fields),
    )


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-300] ^= 1
    path.write_bytes(content)


def move_away(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


HAPPENS = {"cut off": cut_off, "bit": turn_a_bit, "moved": move_away}


def train_while(config: TrainConfig, step: int, happens: str, path: Path) -> str:
    """Runs on every rank: on the first one something happens to a file before a step; all that is said, errors too."""
    told = io.StringIO()
    trainer = Trainer(config, torch.device("cpu"), console=Console(file=told, width=1000))
    whole_step = trainer.train_step

    def train_step() -> Any:
        if trainer.step == step and torch.distributed.get_rank() == 0:
            HAPPENS[happens](path)
        torch.distributed.barrier()
        return whole_step()

    trainer.train_step = train_step  # type: ignore[method-assign]
    try:
        trainer.train()
    except LostClips as error:
        return f"{told.getvalue()}{error}"
    return told.getvalue()


def train_here(config: TrainConfig) -> None:
    """Runs on every rank."""
    Trainer(config, torch.device("cpu")).train()


def train_where_some_cannot_read(config: TrainConfig, blind: list[int]) -> None:
    """Runs on every rank: some of them cannot read one clip, as from a bad disk of their node."""
    getitem = NativeClips.__getitem__

    def read(clips: NativeClips, index: int) -> Any:
        if index == 3 and torch.distributed.get_rank() in blind:
            raise VideoError("no such clip here")
        return getitem(clips, index)

    NativeClips.__getitem__ = read  # type: ignore[method-assign]
    try:
        train_here(config)
    finally:
        NativeClips.__getitem__ = getitem  # type: ignore[method-assign]


def curve(out: Path) -> torch.Tensor:
    told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == list(range(1, len(told) + 1))
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in told], dtype=torch.float64)


@pytest.mark.parametrize("native", [True, False], ids=["packed", "one-size"])
def test_a_file_that_breaks_is_left_out_and_a_resumed_run_leaves_out_the_same(
    videos: Path, run_distributed: Any, native: bool
) -> None:
    # Clips of one size are kept once they were decoded: the file breaks before any is. Two data-parallel ranks read
    # different clips, so that only one of them meets a broken one.
    own, at = ({}, 3) if native else ({"native_sizes": False, "token_budget": None, "height": 16, "width": 16}, 0)
    config = run(videos, **own)
    if not native:
        config = replace(config, parallel=ParallelConfig(precision="fp64"))
    told = run_distributed(train_while, 2, config, at, "cut off", videos / RED)[0]
    whole = curve(config.out)
    assert len(whole) == 12
    kept = json.loads((config.out / BROKEN_CLIPS).read_text())
    assert {entry["file"] for entry in kept["clips"]} == {RED}
    assert all(at <= entry["step"] < 8 for entry in kept["clips"])
    assert f"left out from step {kept['clips'][0]['step'] + 1} on: {videos / RED}: " in told

    # As if it had been killed before its last checkpoint, on other ranks, without the file.
    (videos / RED).unlink()
    again = replace(config, out=videos.parent / "again", resume=True, parallel=ParallelConfig(precision="fp64"))
    shutil.copytree(config.out, again.out)
    shutil.rmtree(again.out / "checkpoints" / "step-000012")
    with process_group():
        train_here(again)
    assert ((curve(again.out) - whole).abs() / whole.abs()).max() < 1e-10
    assert json.loads((again.out / BROKEN_CLIPS).read_text())["clips"] == kept["clips"]


def test_what_one_rank_of_a_sequence_cannot_read_all_of_them_replace(videos: Path, run_distributed: Any) -> None:
    # Every clip in every step, so that the batch built ahead holds the broken one.
    config = replace(run(videos, batch_size=4), steps=3)
    curves = []
    for name, blind in (("one", [1]), ("both", [0, 1])):
        out = videos.parent / name
        run_distributed(train_where_some_cannot_read, 2, replace(config, out=out), blind)
        (entry,) = json.loads((out / BROKEN_CLIPS).read_text())["clips"]
        assert (entry["clip"], entry["step"], entry["reason"]) == (3, 0, "no such clip here")
        curves.append(curve(out))
    assert torch.equal(*curves)


def test_where_every_file_is_gone_the_run_ends_with_its_state_saved(videos: Path, run_distributed: Any) -> None:
    config = run(videos)
    whole = replace(config, out=videos.parent / "whole")
    run_distributed(train_here, 2, whole)
    moved = videos.with_name("elsewhere")
    one, other = run_distributed(train_while, 2, config, 5, "moved", videos)
    assert one.endswith(other)
    assert re.search(r"no such file; .*\(saved after step [567]\)", one)
    assert not (config.out / BROKEN_CLIPS).exists()
    moved.rename(videos)
    run_distributed(train_here, 2, replace(config, resume=True))
    assert torch.equal(curve(config.out), curve(whole.out))


def test_clips_lost_just_after_a_checkpoint_leave_it_as_it_is(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(run(videos), parallel=ParallelConfig())
    with process_group() as device:
        trainer = Trainer(config, device)
        whole_step, publish = trainer.train_step, CheckpointWriter._publish

        def train_step() -> Any:
            if trainer.step == 4:
                raise LostClips("gone")
            return whole_step()

        published = []
        monkeypatch.setattr(trainer, "train_step", train_step)
        monkeypatch.setattr(
            CheckpointWriter,
            "_publish",
            lambda writer, *given: [published.append(given[1].name), publish(writer, *given)],
        )
        with pytest.raises(LostClips, match=r"gone \(saved after step 4\)"):
            trainer.train()
    # Saved once, and what it scores is the loss of its steps.
    assert published == ["step-000004"]
    run_json = json.loads((config.out / "checkpoints" / "step-000004" / "run.json").read_text())
    assert run_json["score"] == pytest.approx(float(curve(config.out)[:, 0].mean()), rel=1e-5)


@pytest.mark.slow
def test_a_shard_that_breaks_is_said_to_be_made_again(videos: Path, run_distributed: Any) -> None:
    made = PrepareConfig(
        videos=videos,
        captions=videos / "captions.json",
        out=videos.parent / "shards",
        processes=1,
        patch_size=(2, 4, 4),
        cut=CutConfig(clip_frames=4),
        text=TEXT,
    )
    prepare(made)
    shard = sorted((made.out / "shards").iterdir())[0]
    config = run(videos, videos=None, shards=made.out, native_sizes=False, num_frames=8, text=TextEncoderConfig())
    whole = replace(config, out=videos.parent / "whole")
    run_distributed(train_here, 2, whole)
    one, other = run_distributed(train_while, 2, config, 5, "bit", shard)
    assert one.endswith(other)
    message = r"does not match its checksum; remove it if it is there, and run the same data/prepare\.py command again"
    assert re.search(message + r", then --resume \(saved after step [567]\)", one)
    shard.unlink()
    prepare(made)
    run_distributed(train_here, 2, replace(config, resume=True))
    assert torch.equal(curve(config.out), curve(whole.out))


INFO = VideoInfo(
    codec="h264", num_frames=3, width=8, height=8, fps=8.0, timestamps=(0, 5, 9), keyframes=((0, -2), (5, 3))
)


class Clips:
    """What BrokenClips asks of a source."""

    def __init__(self, sizes: list[tuple[int, int, int]]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def video(self, index: int) -> tuple[str, VideoInfo]:
        return f"{index}.mp4", INFO


def drawn(tmp_path: Path, sizes: list[tuple[int, int, int]], **options: Any) -> BrokenClips:
    return BrokenClips(Clips(sizes), tmp_path / BROKEN_CLIPS, **({"resume": False, "same_size": False} | options))


def test_a_clip_of_the_same_size_takes_the_place_from_a_step_on(tmp_path: Path) -> None:
    broken = drawn(tmp_path, [(4, 8, 8), (4, 8, 8), (2, 8, 8), (4, 8, 8)])
    broken.add({1: "b", 3: "d"}, 7)
    assert [broken.in_place_of(clip, 6) for clip in range(4)] == [0, 1, 2, 3]
    assert [broken.in_place_of(clip, 7) for clip in range(4)] == [0, 0, 2, 0]
    broken.add({0: "a"}, 9)
    assert broken.in_place_of(3, 8) == 0
    # None of the size is left: a shorter one, or none.
    assert [broken.in_place_of(clip, 9) for clip in (0, 1, 3)] == [2, 2, 2]
    broken.add({2: "c cannot be read"}, 10)
    message = r"c cannot be read; no other clip has a size that fits in its place.*\(0.mp4, 1.mp4, 2.mp4, 3.mp4\)"
    with pytest.raises(LostClips, match=message):
        broken.in_place_of(2, 10)
    same = drawn(tmp_path, [(4, 8, 8), (2, 8, 8)], same_size=True)
    same.add({0: "a"}, 1)
    with pytest.raises(LostClips, match="no other clip has a size that fits"):
        same.in_place_of(0, 1)


def test_a_list_that_cannot_be_written_is_a_warning(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, read = io.StringIO(), NativeClips.__getitem__

    def cannot(*_: Any) -> Any:
        raise OSError("disk full")

    def broken(clips: NativeClips, index: int) -> Any:
        if index == 3:
            raise VideoError("no such clip here")
        return read(clips, index)

    monkeypatch.setattr(BrokenClips, "write", cannot)
    monkeypatch.setattr(NativeClips, "__getitem__", broken)
    config = replace(run(videos, batch_size=4), parallel=ParallelConfig(), steps=2)
    with process_group() as device:
        trainer = Trainer(config, device, console=Console(file=told, width=1000))
        trainer.train()
        assert "warning: disk full; a resumed run will not know which clips were left out" in told.getvalue()
        # What a step was made of is said although a clip of it cannot be read any more.
        monkeypatch.setattr(NativeClips, "__getitem__", lambda *_: broken(_[0], 3))
        assert {
            sample["unreadable"]
            for sample in trainer.source.batches(
                trainer.model.objective, device, drawn(videos.parent, [(1, 1, 1)] * len(trainer.clips))
            ).describe(0)
        } == {"no such clip here"}


def test_what_is_kept_is_read_again_and_damage_is_named(tmp_path: Path) -> None:
    sizes = [(4, 8, 8)] * 3
    broken = drawn(tmp_path, sizes)
    broken.add({1: "b"}, 7)
    broken.write()
    again = drawn(tmp_path, sizes, resume=True)
    assert [again.in_place_of(clip, 7) for clip in range(3)] == [0, 2, 2]
    assert known_videos(tmp_path / BROKEN_CLIPS) == {"1.mp4": INFO}
    # A run of before `seekable` was noted can be resumed.
    (tmp_path / "older.json").write_text((tmp_path / BROKEN_CLIPS).read_text().replace('"seekable"', '"other"'))
    assert "other" in (tmp_path / "older.json").read_text()
    assert known_videos(tmp_path / "older.json") == {"1.mp4": INFO}
    with pytest.raises(ValueError, match=r"broken-clips\.json: of more clips than the 1 of this run"):
        drawn(tmp_path, sizes[:1], resume=True)
    cut_off(tmp_path / BROKEN_CLIPS)
    for read in (lambda: drawn(tmp_path, sizes, resume=True), lambda: known_videos(tmp_path / BROKEN_CLIPS)):
        with pytest.raises(ValueError, match=r"broken-clips\.json: damaged: "):
            read()
