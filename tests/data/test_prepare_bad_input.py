"""data/prepare.py on bad input: each file costs itself alone, is counted and named, and nothing waits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from longreel.data.cutting import CutConfig
from longreel.data.prepare_config import PrepareConfig
from longreel.data.prepare_run import prepare
from longreel.data.prepare_summary import KINDS
from longreel.data.shards import ShardDataset


@pytest.fixture
def good(encode: Callable[..., Path]) -> Path:
    """A folder with one good video."""
    path = encode("good.mp4", np.random.default_rng(0).integers(16, 235, (8, 32, 32), np.uint8), g="1")
    folder = path.parent / "videos"
    folder.mkdir()
    path.rename(folder / path.name)
    return folder


def run(folder: Path, captions: object, suffix: str = ".json", **options: Any) -> tuple[ShardDataset, dict[str, Any]]:
    """Prepare with captions (JSON value, text or bytes); the data set and the summary."""
    file = folder.parent / f"captions{suffix}"
    if isinstance(captions, bytes):
        file.write_bytes(captions)
    else:
        file.write_text(captions if isinstance(captions, str) else json.dumps(captions))
    out = folder.parent / "out"
    prepare(PrepareConfig(videos=folder, captions=file, out=out, processes=1, **options))
    return ShardDataset(out), json.loads((out / "summary.json").read_text())


def entry(file: str, *captions: str) -> dict[str, Any]:
    return {"file": file, "captions": list(captions) or ["a caption"]}


def problems(summary: dict[str, Any], kind: str) -> dict[str, str]:
    found = {problem["path"]: problem["reason"] for problem in summary["problems"] if problem["kind"] == kind}
    assert len(found) == summary["left_out"][kind]
    return found


def test_files_that_are_no_videos(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (good / "good.mp4").read_bytes()
    (good / "truncated.mp4").write_bytes(content[: len(content) // 2])
    (good / "empty.mp4").write_bytes(b"")
    (good / "lying.mp4").write_text("no video at all " * 40)
    (good / "folder.mp4").mkdir()
    with av.open(str(good / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(good / "no_frames.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        container.start_encoding()
    names = ("truncated", "empty", "lying", "sound", "no_frames", "good")
    clips, summary = run(good, [entry(f"{name}.mp4") for name in (*names, "folder")])
    assert [clip.source for clip in clips] == ["good.mp4"]
    unreadable = problems(summary, "unreadable")
    assert set(unreadable) == {f"{name}.mp4" for name in names} - {"good.mp4"}
    assert unreadable["sound.mp4"] == "holds no video stream that can be decoded"
    assert "Invalid data" in unreadable["empty.mp4"]
    assert set(problems(summary, "missing")) == {"folder.mp4"}
    assert all(reason and "\n" not in reason for reason in unreadable.values())
    assert "5 videos that cannot be read:" in capsys.readouterr().err


def test_a_stream_that_breaks_off_gives_the_clips_before(encode: Callable[..., Path], good: Path) -> None:
    pictures = np.random.default_rng(1).integers(16, 235, (12, 32, 32), np.uint8)
    whole = encode("whole.ts", pictures, g="1").read_bytes()
    (good / "cut.ts").write_bytes(whole[: len(whole) * 2 // 3])
    clips, summary = run(good, [entry("cut.ts"), entry("good.mp4")], cut=CutConfig(clip_frames=4, min_frames=4))
    starts = [clip.start for clip in clips if clip.source == "cut.ts"]
    assert starts[:1] == [0]
    assert len(starts) < 3
    assert summary["left_out"]["damaged"] + summary["left_out"]["too_short"] >= 1


def test_frames_that_cannot_be_decoded_cost_their_clip(good: Path) -> None:
    content = bytearray((good / "good.mp4").read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    middle = start + (end - start) * 3 // 8
    content[middle : middle + 400] = bytes(400)
    (good / "damaged.mp4").write_bytes(content)
    clips, summary = run(good, [entry("damaged.mp4"), entry("good.mp4")], cut=CutConfig(clip_frames=2))
    damaged = [problem for problem in summary["problems"] if problem["kind"] == "damaged"]
    assert [problem["path"] for problem in damaged] == ["damaged.mp4"]
    assert damaged[0]["frames"] == 2
    assert len(clips) == 4 + 3


def test_captions_without_videos_and_videos_without_captions(good: Path) -> None:
    (good / "sub").mkdir()
    for name in ("sub/uncaptioned.mp4", "UPPER.MP4", "notes.txt"):
        (good / name).write_bytes((good / "good.mp4").read_bytes())
    clips, summary = run(good, [entry("good.mp4"), entry("gone.mp4"), entry("x" * 5000 + ".mp4")])
    assert len(clips) == 1
    assert set(problems(summary, "missing")) == {"gone.mp4", "x" * 5000 + ".mp4"}
    assert set(problems(summary, "uncaptioned")) == {"sub/uncaptioned.mp4", "UPPER.MP4"}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_duplicate_names_lose_no_caption(good: Path, suffix: str) -> None:
    entries = [entry("good.mp4", "one"), entry("./good.mp4", "two"), entry("good.mp4", "three")]
    captions = entries if suffix == ".json" else "\n".join(map(json.dumps, entries))
    clips, summary = run(good, captions, suffix)
    assert clips[0].captions == ("one", "two", "three")
    assert len(clips) == 1
    assert summary["left_out"]["merged_captions"] == 2


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_captions_that_are_not_utf8_cost_their_entry(good: Path, suffix: str) -> None:
    if suffix == ".csv":
        captions = b"path,text\nother.mp4,caf\xe9\ngood.mp4,fine\n"
    else:
        lines = [b'{"file": "other.mp4", "captions": ["caf\xe9"]}', b'{"file": "good.mp4", "captions": ["fine"]}']
        captions = b"[" + b",".join(lines) + b"]" if suffix == ".json" else b"\n".join(lines)
    clips, summary = run(good, captions, suffix)
    assert clips[0].captions == ("fine",)
    ((place, reason),) = problems(summary, "bad_captions").items()
    assert reason.startswith("not UTF-8 text")
    assert place == {".json": "entry 0", ".jsonl": "line 1", ".csv": "line 2"}[suffix]


def test_lines_that_are_no_entries_are_named(good: Path) -> None:
    lines = ["", "{broken", json.dumps(entry("good.mp4")), "[1, 2]", json.dumps({"file": "good.mp4"})]
    clips, summary = run(good, "\n".join(lines), ".jsonl")
    assert len(clips) == 1
    assert set(problems(summary, "bad_captions")) == {"line 2", "line 4", "line 5"}
    assert "not valid JSON" in problems(summary, "bad_captions")["line 2"]


def test_file_names_that_are_not_utf8_are_counted(good: Path) -> None:
    (good / b"caf\xe9.mp4".decode("utf-8", "surrogateescape")).write_bytes(b"")
    _, summary = run(good, [entry("good.mp4")])
    assert set(problems(summary, "uncaptioned")) == {"caf\\xe9.mp4"}


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_a_caption_of_a_megabyte_is_kept_whole(good: Path, suffix: str) -> None:
    long = "a red square " * 80_000
    captions = [entry("good.mp4", long)] if suffix == ".json" else f'path,text\ngood.mp4,"{long}"\n'
    clips, _ = run(good, captions, suffix)
    assert clips[0].captions == (long,)


def test_lone_surrogates_become_question_marks(good: Path) -> None:
    clips, _ = run(good, '[{"file": "good.mp4", "captions": ["a \\ud800 b"]}]')
    assert clips[0].captions == ("a ? b",)


def test_paths_that_leave_the_folder_are_not_read(good: Path) -> None:
    outside = good.parent / "outside.mp4"
    outside.write_bytes((good / "good.mp4").read_bytes())
    (good / "link.mp4").symlink_to(outside)
    (good / "linked").symlink_to(good.parent, target_is_directory=True)
    (good / "loop.mp4").symlink_to(good / "loop.mp4")
    (good / "fine.mp4").symlink_to(good / "good.mp4")
    names = ["link.mp4", "linked/outside.mp4", "loop.mp4", "../outside.mp4", str(outside), "fine.mp4"]
    clips, summary = run(good, [entry(name) for name in names])
    assert [clip.source for clip in clips] == ["fine.mp4"]
    assert set(problems(summary, "outside")) == {"link.mp4", "linked/outside.mp4"}
    assert "through a link" in problems(summary, "outside")["link.mp4"]
    refused = [problem["reason"] for problem in summary["problems"] if problem["kind"] == "bad_captions"]
    assert len(refused) == 2
    assert all("leaves the folder" in reason for reason in refused)
    assert set(problems(summary, "missing")) == {"loop.mp4"}


def test_pictures_smaller_than_a_patch_and_clips_too_short(good: Path) -> None:
    clips, summary = run(good, [entry("good.mp4")], cut=CutConfig(clip_frames=5, min_frames=5))
    assert len(clips) == 1
    assert problems(summary, "too_short") == {"good.mp4": "3 frames from frame 5 on; a clip needs 5"}
    with pytest.raises(ValueError, match=r"no video gave a clip; .*summary\.json says why for each"):
        prepare(
            PrepareConfig(
                videos=good,
                captions=good.parent / "captions.json",
                out=good.parent / "small",
                processes=1,
                patch_size=(1, 64, 64),
            )
        )
    summary = json.loads((good.parent / "small" / "summary.json").read_text())
    assert "32x32 pixels is smaller than 64x64" in problems(summary, "unreadable")["good.mp4"]
    assert set(summary["left_out"]) == set(KINDS)
