"""Damage that FFmpeg paints over: the frames it is in, and those predicted from them, are named and not trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from longreel.data import whole_frames
from longreel.data.captions import CaptionedFile
from longreel.data.clips import ClipDataset
from longreel.data.cutting import CropConfig, CutConfig
from longreel.data.native import FrameReader
from longreel.data.native_clips import NativeClips
from longreel.data.pictures import decode_clip
from longreel.data.prepare_config import PrepareConfig
from longreel.data.prepare_run import prepare
from longreel.data.shards import ShardDataset
from longreel.data.video import VideoError, VideoInfo, probe, scan

GROUP, FRAMES = 8, 24


def moving(num_frames: int) -> np.ndarray:
    """A pattern that moves, so that frames are predicted from those before."""
    coarse = np.random.default_rng(0).integers(16, 235, (24, 24), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([coarse[i : i + 64, 2 * i : 2 * i + 96] for i in range(num_frames)])


def damage(path: Path, frame: int, *, zeros: bool = False) -> Path:
    """A copy with some bits of its frame-th packet turned over, or with zeros from its middle on."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    at, size = packets[frame]
    for place in range(at + size // 2, at + size if zeros else at + size // 2 + 8):
        content[place] = 0 if zeros else content[place] ^ 0x55
    damaged = path.with_name(f"damaged{path.suffix}")
    damaged.write_bytes(content)
    return damaged


def refused_frames(whole: Path, damaged: Path, info: VideoInfo) -> dict[int, str]:
    """{frame: reason} of those that are not read; the others are the whole video's."""
    refused = {}
    with FrameReader(damaged, info, CropConfig()) as reader, FrameReader(whole, info, CropConfig()) as pictures:
        for index in range(info.num_frames):
            try:
                picture = reader.read(index)
            except VideoError as error:
                refused[index] = str(error)
            else:
                assert np.array_equal(picture, pictures.read(index)), index
    return refused


# Seeking in them leaves out or spoils frames that are whole: open groups in a transport stream, keyframes that are
# themselves predicted, a program stream whose seeks land within a frame.
HARD_TO_SEEK = {
    "open.ts": {"g": "8", "bf": "3", "x264-params": "min-keyint=8:open-gop=1:scenecut=0", "crf": "23"},
    "refresh.mp4": {"g": "12", "bf": "0", "x264-params": "intra-refresh=1:scenecut=0", "crf": "23"},
    "program.mpg": {"codec": "mpeg2video", "g": "8", "bf": "2"},
}


@pytest.fixture(params=["libx264", "libx265"])
def videos(request: pytest.FixtureRequest, encode: Callable[..., Path]) -> Path:
    """A folder of a whole video, and of one with frame 11 damaged: a predicted one in the second of three groups."""
    options = {"g": str(GROUP), "bf": "0"}
    if request.param == "libx265":
        options["x265-params"] = f"log-level=none:pools=1:hash=1:bframes=0:keyint={GROUP}:min-keyint={GROUP}"
    path = encode("whole.mp4", moving(FRAMES), codec=request.param, crf="20", **options)
    damage(path, 11)
    (path.parent / "captions.json").write_text(
        json.dumps([{"file": name, "captions": ["a"]} for name in ("whole.mp4", "damaged.mp4")])
    )
    return path.parent


@pytest.mark.parametrize("videos", ["libx264"], indirect=True)
def test_ffmpeg_alone_shows_every_frame_and_no_error(videos: Path) -> None:
    shown = []
    for name in ("damaged.mp4", "whole.mp4"):
        with av.open(str(videos / name)) as container:
            shown.append([frame.to_ndarray() for frame in container.decode(video=0)])
    damaged, whole = shown
    assert len(damaged) == len(whole) == FRAMES
    assert sum(not np.array_equal(*pair) for pair in zip(damaged, whole, strict=True)) == 5


def test_probe_and_training_sources_name_the_file(videos: Path) -> None:
    with pytest.raises(VideoError, match=r"damaged\.mp4: damaged: only \d+ of its 24 frames can be decoded whole"):
        probe(videos / "damaged.mp4")
    files = [CaptionedFile(file=name, captions=("a",)) for name in ("whole.mp4", "damaged.mp4")]
    clips = ClipDataset(videos, files, num_frames=4, height=32, width=32)
    native = NativeClips(videos, files, cut=CutConfig(clip_frames=4), crop=CropConfig())
    for source in (clips, native):
        assert len(source) == FRAMES // 4
        ((name, reason),) = source.skipped
        assert name == "damaged.mp4"
        assert reason.startswith("damaged: only ")


def test_a_damaged_frame_takes_those_predicted_from_it_along(videos: Path) -> None:
    info = scan(videos / "damaged.mp4")
    refused = refused_frames(videos / "whole.mp4", videos / "damaged.mp4", info)
    assert list(refused) == [11, 12, 13, 14, 15]
    assert all(f"damaged.mp4: frame {index} " in reason for index, reason in refused.items())


def test_clips_behind_the_damage_are_read_and_those_in_it_are_not(videos: Path) -> None:
    info = probe(videos / "whole.mp4")
    for start in (0, 16):
        ours, whole = (
            decode_clip(videos / f"{n}.mp4", 8, 32, 48, start=start, info=info) for n in ("damaged", "whole")
        )
        assert torch.equal(ours, whole)
    for start in (8, 12):
        with pytest.raises(VideoError, match=r"frame 1[12] (is damaged|cannot be decoded)"):
            decode_clip(videos / "damaged.mp4", 4, 32, 48, start=start, info=info)


def test_prepare_names_the_stretch_and_keeps_the_rest(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(
        PrepareConfig(
            videos=videos, captions=videos / "captions.json", out=out, processes=1, cut=CutConfig(clip_frames=4)
        )
    )
    assert [clip.start for clip in ShardDataset(out) if clip.source == "damaged.mp4"] == [0, 4, 16, 20]
    problems = json.loads((out / "summary.json").read_text())["problems"]
    assert [(problem["kind"], problem["path"], problem["frames"]) for problem in problems] == [
        ("damaged", "damaged.mp4", 4)
    ] * 2


@pytest.mark.parametrize("which", ["predicted", "keyframe"])
def test_frames_predicted_from_both_sides_are_not_taken_for_whole(encode: Callable[..., Path], which: str) -> None:
    options = {"g": str(GROUP), "bf": "2", "x264-params": "open-gop=1:b-adapt=0"}
    path = encode("whole.mp4", moving(FRAMES), crf="20", **options)
    info = probe(path)
    with av.open(str(path)) as container:
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    # One that is shown after others which are decoded after it.
    number, pts, shown_before = next(
        (n, pts, packets[n + 1][0])
        for n, (pts, key) in enumerate(packets)
        if n > 0 and pts > packets[n + 1][0] and key == (which == "keyframe")
    )
    refused = refused_frames(path, damage(path, number, zeros=True), info)
    assert info.timestamps.index(pts) in refused
    assert info.timestamps.index(shown_before) in refused


@pytest.mark.parametrize("name", HARD_TO_SEEK)
def test_every_frame_alone_is_that_of_the_sequential_read(encode: Callable[..., Path], name: str) -> None:
    path = encode(name, noisy(40), **HARD_TO_SEEK[name])
    info = probe(path)
    assert len(info.keyframes) > 2
    with FrameReader(path, info, CropConfig()) as reader:
        sequential = np.stack([reader.read(index) for index in range(40)])
    for index, picture in enumerate(sequential):
        with FrameReader(path, info, CropConfig()) as reader:
            assert np.array_equal(reader.read(index), picture), index
    for start in (3, 14, 25):
        clip = decode_clip(path, 5, 64, 96, start=start, stride=3, info=info)
        assert np.array_equal(clip, sequential[start : start + 15 : 3])


def noisy(num_frames: int) -> np.ndarray:
    """Noise that moves, with a bar that changes."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 96), np.uint8)
    pictures = np.stack([np.roll(noise, 3 * i, axis=1) for i in range(num_frames)])
    pictures[:, :8] = (5 * np.arange(num_frames) % 255)[:, None, None]
    return pictures


def test_with_intra_refresh_damage_reaches_into_the_next_group(encode: Callable[..., Path]) -> None:
    path = encode("refresh.mp4", noisy(40), **HARD_TO_SEEK["refresh.mp4"])
    info = probe(path)
    second, third = (info.timestamps.index(time) for time, _ in info.keyframes[1:3])
    # The keyframe behind the damage is predicted from it; its group is whole again where the refresh has gone round.
    refused = list(refused_frames(path, damage(path, 5, zeros=True), info))
    assert refused == list(range(5, refused[-1] + 1))
    assert second < refused[-1] < third
    with pytest.raises(VideoError, match=rf"frame {second} is damaged"):
        decode_clip(path.with_name("damaged.mp4"), 1, 64, 96, start=second, info=info)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the keyframes that passes through files began at."""
    begun = []
    frames_from = whole_frames.frames_from

    def counted(*arguments: Any) -> Any:
        begun.append(arguments[-1])
        return frames_from(*arguments)

    monkeypatch.setattr(whole_frames, "frames_from", counted)
    return begun


def test_one_keyframe_earlier_is_enough_where_that_gives_a_whole_frame(
    encode: Callable[..., Path], passes: list[int]
) -> None:
    path = encode("refresh.mp4", noisy(40), **HARD_TO_SEEK["refresh.mp4"])
    info = probe(path)
    with FrameReader(path, info, CropConfig()) as reader:
        for index in range(info.timestamps.index(info.keyframes[2][0]), 40):
            reader.read(index)
    assert passes == [2, 1]


def test_damage_costs_one_pass_from_the_start(encode: Callable[..., Path], passes: list[int]) -> None:
    path = encode("whole.mp4", noisy(64), crf="20", g=str(GROUP), bf="0")
    info, damaged = probe(path), damage(damage(path, 19), 43)
    assert list(refused_frames(path, damaged, info)) == [*range(19, 24), *range(43, 48)]
    # Two open the whole video and the damaged one; the third is that which judges.
    assert passes.count(0) == 3
    assert len(passes) < 24
