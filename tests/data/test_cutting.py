"""data/cutting.py: which frames clips are made of."""

from __future__ import annotations

from fractions import Fraction

import pytest

from longreel.data.cutting import CropConfig, CutConfig, check_clip_length, chosen_frames, clip_fps, cut_by_length
from longreel.data.video import VideoInfo


def info(num_frames: int = 10, *, fps: float = 25, times: tuple[int, ...] | None = None) -> VideoInfo:
    if times is None:
        times = tuple(range(num_frames))
        base = Fraction(1) / Fraction(fps)
    else:
        base = Fraction(1, 100)
    return VideoInfo(
        codec="h264",
        num_frames=num_frames,
        width=64,
        height=32,
        fps=fps,
        timestamps=times,
        keyframes=(),
        time_base=base,
    )


def test_every_frame_or_every_nth() -> None:
    assert chosen_frames(info(7), CutConfig()) == list(range(7))
    assert chosen_frames(info(7), CutConfig(frame_stride=3)) == [0, 3, 6]
    assert clip_fps(info(fps=30), CutConfig(frame_stride=3)) == 10


def test_a_constant_rate_is_thinned_or_repeated() -> None:
    assert chosen_frames(info(10, fps=30), CutConfig(fps=10)) == [0, 3, 6, 9]
    assert chosen_frames(info(4, fps=10), CutConfig(fps=20)) == [0, 0, 1, 1, 2, 2, 3, 3]
    # 29.97 to 24: every fourth of five, now and then one more.
    frames = chosen_frames(info(300, fps=30000 / 1001), CutConfig(fps=24))
    assert len(frames) == 241
    assert frames[:6] == [0, 1, 2, 3, 4, 6]
    assert clip_fps(info(fps=30), CutConfig(fps=24)) == 24


def test_variable_rate_becomes_constant_by_time_stamps() -> None:
    # Shown at 0, 0.1, 0.2, 1.0 and 1.1 s: the third frame stands for 0.8 s.
    video = info(5, times=(50, 60, 70, 150, 160))
    assert chosen_frames(video, CutConfig(fps=5)) == [0, 2, 2, 2, 2, 3]
    assert chosen_frames(video, CutConfig(fps=10)) == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4]


def test_without_time_stamps_the_average_rate_counts() -> None:
    assert chosen_frames(info(10, fps=30, times=()), CutConfig(fps=15)) == [0, 2, 4, 6, 8]
    assert chosen_frames(info(4, fps=0, times=()), CutConfig(fps=25)) == [0, 1, 2, 3]


def test_one_frame_is_a_clip() -> None:
    assert chosen_frames(info(1), CutConfig(fps=24)) == [0]


def test_lengths_are_multiples_and_short_rests_are_left_out() -> None:
    frames = range(21)
    assert [len(clip) for clip in cut_by_length(frames, CutConfig(clip_frames=8), CropConfig(frames=2))] == [8, 8, 4]
    cut = CutConfig(clip_frames=8, min_frames=5)
    assert [clip[0] for clip in cut_by_length(frames, cut, CropConfig(frames=4))] == [0, 8]
    assert [len(clip) for clip in cut_by_length(frames, CutConfig(clip_frames=None), CropConfig(frames=4))] == [20]
    assert cut_by_length(range(3), CutConfig(), CropConfig(frames=4)) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_frames": 0}, "clip_frames must be at least 1"),
        ({"min_frames": 9, "clip_frames": 8}, "min_frames 9 is more than clip_frames 8"),
        ({"frame_stride": 2, "fps": 8.0}, "give fps or frame_stride, not both"),
        ({"fps": 0.0}, "fps must be between"),
        ({"scene_threshold": 300.0}, "scene_threshold must be between 0 and 255"),
    ],
)
def test_refuses(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CutConfig(**fields)


def test_clip_length_that_no_latent_has() -> None:
    with pytest.raises(ValueError, match=r"clip_frames 30 is not a multiple of 4, .*; use 28"):
        check_clip_length(CutConfig(clip_frames=30), CropConfig(frames=4))
