"""longreel.data.clips: which clips exist, which were left out, and what a step reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from longreel.data.captions import CaptionedFile, load_captions
from longreel.data.clips import ClipDataset, per_sample_generator, sample_ids
from longreel.data.demo import make_demo_folder
from longreel.data.mp4 import write_mp4
from longreel.data.pictures import read_clip
from longreel.data.video import VideoError, probe


def captioned(*names: str) -> list[CaptionedFile]:
    return [CaptionedFile(file=name, captions=(f"a clip named {name}",)) for name in names]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, length in (("long.mp4", 20), ("exact.mp4", 8), ("short.mp4", 7)):
        level = torch.linspace(-0.9, 0.9, length).view(-1, 1, 1, 1)
        write_mp4(tmp_path / name, level.expand(length, 16, 16, 3), 8)
    (tmp_path / "broken.mp4").write_text("not a video")
    return tmp_path


def test_clips_follow_each_other_without_overlap(folder: Path) -> None:
    clips = ClipDataset(folder, captioned("long.mp4", "exact.mp4"), num_frames=8, height=16, width=16)
    assert [clips.locate(i) for i in range(len(clips))] == [("long.mp4", 0), ("long.mp4", 8), ("exact.mp4", 0)]
    assert clips.skipped == []
    video, captions = clips[1]
    assert captions == ("a clip named long.mp4",)
    assert torch.equal(video, read_clip(folder / "long.mp4", 8, 16, 16, start=8))


def test_stride_widens_the_span(folder: Path) -> None:
    clips = ClipDataset(folder, captioned("long.mp4"), num_frames=4, height=16, width=16, stride=3)
    assert [clips.locate(i) for i in range(len(clips))] == [("long.mp4", 0), ("long.mp4", 10)]
    assert torch.equal(clips[1][0], read_clip(folder / "long.mp4", 4, 16, 16, start=10, stride=3))


def test_unusable_videos_are_named_with_the_reason(folder: Path) -> None:
    files = captioned("missing.mp4", "broken.mp4", "short.mp4", "exact.mp4")
    clips = ClipDataset(folder, files, num_frames=8, height=16, width=16)
    assert len(clips) == 1
    assert [name for name, _ in clips.skipped] == ["missing.mp4", "broken.mp4", "short.mp4"]
    reasons = dict(clips.skipped)
    assert reasons["missing.mp4"] == "no such file"
    assert "Invalid data" in reasons["broken.mp4"]
    assert reasons["short.mp4"] == "has 7 frames; a clip of 8 frames spans 8"


@pytest.mark.parametrize("keyframes", ["1", "250"], ids=["all-keyframes", "one-keyframe"])
def test_video_that_breaks_off_is_left_out_from_the_start(encode: Callable[..., Path], keyframes: str) -> None:
    pictures = np.random.default_rng(0).integers(16, 235, (24, 32, 32), np.uint8)
    whole, broken = encode("whole.mp4", pictures, g=keyframes), encode("broken.mp4", pictures, g=keyframes)
    content = bytearray(broken.read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    third = (end - start) // 3
    content[end - third : end] = bytes(third)
    broken.write_bytes(content)
    clips = ClipDataset(whole.parent, captioned("broken.mp4", "whole.mp4"), num_frames=8, height=16, width=16)
    assert [name for name, _ in clips.skipped] == ["broken.mp4"]
    assert clips.skipped[0][1]
    assert [clips.locate(i) for i in range(len(clips))] == [("whole.mp4", 0), ("whole.mp4", 8), ("whole.mp4", 16)]


def test_no_usable_video_is_an_error(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"none of 2 videos gives clips of 8 frames; the first: broken\.mp4: Inv"
    ) as raised:
        ClipDataset(folder, captioned("broken.mp4", "short.mp4"), num_frames=8, height=16, width=16)
    assert "\n" not in str(raised.value)


def test_cache_serves_clips_after_the_file_is_gone_and_respects_its_size(folder: Path) -> None:
    one_clip = 8 * 16 * 16 * 3
    clips = ClipDataset(folder, captioned("long.mp4"), num_frames=8, height=16, width=16, cache_bytes=one_clip)
    first = clips[0][0]
    (folder / "long.mp4").unlink()
    again = clips[0][0]
    assert torch.equal(first, again)
    again.zero_()
    assert torch.equal(first, clips[0][0])
    with pytest.raises(VideoError, match="no such file"):
        clips[1]


def test_index_out_of_range(folder: Path) -> None:
    clips = ClipDataset(folder, captioned("exact.mp4"), num_frames=8, height=16, width=16)
    for index in (-1, 1):
        with pytest.raises(IndexError, match=f"clip {index} of 1"):
            clips[index]


def test_real_videos(sample_videos: Path) -> None:
    clips = ClipDataset(
        sample_videos, load_captions(sample_videos / "captions.json"), num_frames=10, height=16, width=16
    )
    assert clips.skipped == []
    assert Counter(clips.locate(i)[0] for i in range(len(clips))) == {
        "nasa_13013.mp4": 39,
        "bt709_full_range.mp4": 3,
        "h265_video.mp4": 1,
    }
    assert len(clips[0][1]) == 2


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12])
def test_every_epoch_reads_every_clip_once(batch_size: int) -> None:
    stream = [clip for step in range(20) for clip in sample_ids(7, step, batch_size, 5)]
    assert len(stream) == 20 * batch_size
    epochs = [tuple(stream[i : i + 5]) for i in range(0, len(stream) - 4, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 1
    assert sample_ids(7, 3, batch_size, 5) == stream[3 * batch_size : 4 * batch_size]


def test_sampling_depends_on_the_seed() -> None:
    assert sample_ids(1, 0, 20, 20) != sample_ids(2, 0, 20, 20)


@pytest.mark.parametrize(
    "arguments", [(0, -1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0)], ids=["step", "batch_size", "num_clips"]
)
def test_sampling_refuses(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        sample_ids(*arguments)


def test_generator_is_the_same_for_the_same_sample_and_differs_for_any_other() -> None:
    def draw(*key: int) -> float:
        return float(torch.rand((), generator=per_sample_generator(*key), dtype=torch.float64))

    assert draw(0, 1, 2) == draw(0, 1, 2)
    keys = [(seed, sample, step) for seed in range(4) for sample in range(4) for step in range(4)]
    values = [draw(*key) for key in keys]
    assert len(set(values)) == len(keys)
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.15)


def test_demo_folder_trains_out_of_the_box(tmp_path: Path) -> None:
    captions = make_demo_folder(tmp_path / "demo")
    files = load_captions(captions)
    assert len(files) == 4
    assert {p.name for p in captions.parent.iterdir()} == {"captions.json", *(f.file for f in files)}
    clips = ClipDataset(captions.parent, files, num_frames=16, height=32, width=32)
    assert len(clips) == 8
    info = probe(captions.parent / files[0].file)
    assert (info.num_frames, info.width, info.height) == (32, 64, 64)


def test_demo_shapes_move_as_their_captions_say(tmp_path: Path) -> None:
    captions = make_demo_folder(tmp_path)
    for file in load_captions(captions):
        clip = read_clip(tmp_path / file.file, 32, 64, 64)
        centres = [(frame.amax(-1) > 0).nonzero().float().mean(0) for frame in (clip[0], clip[-1])]
        down, right = (centres[1] - centres[0]).tolist()
        direction = ("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up")
        assert max(abs(down), abs(right)) > 16
        assert direction in file.captions[0]
