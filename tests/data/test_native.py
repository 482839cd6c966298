"""data/native.py: frames in their own size, in every codec, and clips of them on the fly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from longreel.data.captions import CaptionedFile, load_captions
from longreel.data.cutting import CropConfig, CutConfig
from longreel.data.native import FrameReader, LostFrames, Pixels, read_clips
from longreel.data.native_clips import NativeClips
from longreel.data.pictures import decode_clip
from longreel.data.video import probe, scan
from longreel.models.autoencoders import AutoencoderConfig, build_autoencoder


def ramp(num_frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame i is flat grey of level 40 + 8 * i."""
    return np.broadcast_to((40 + 8 * np.arange(num_frames, dtype=np.uint8))[:, None, None], (num_frames, height, width))


def number(picture: np.ndarray | torch.Tensor) -> int:
    """Which frame of a ramp a picture is."""
    return round((float(np.asarray(picture).mean()) / 255 * 219 + 16 - 40) / 8)


@pytest.mark.parametrize(
    ("codec", "name"),
    [("libx264", "a.mp4"), ("libx265", "a.mp4"), ("libsvtav1", "a.mp4"), ("libvpx-vp9", "a.webm"), ("libx264", "a.ts")],
)
def test_every_codec_gives_every_frame(encode: Callable[..., Path], codec: str, name: str) -> None:
    path = encode(name, ramp(12, 64, 80), codec=codec)
    info = scan(path)
    assert (info.num_frames, info.shown_size) == (12, (64, 80))
    with FrameReader(path, info, CropConfig()) as reader:
        assert [number(reader.read(index)) for index in (0, 1, 5, 5, 11, 3, 4)] == [0, 1, 5, 5, 11, 3, 4]


def test_pixels_are_those_of_the_video(sample_videos: Path) -> None:
    path = sample_videos / "h265_video.mp4"
    with FrameReader(path, probe(path), CropConfig()) as reader:
        ours = np.stack([reader.read(index) for index in range(10)])
    assert np.array_equal(ours, decode_clip(path, 10, 128, 128).numpy())


def test_odd_sizes_are_cropped_around_the_centre_and_nothing_is_scaled(encode: Callable[..., Path]) -> None:
    picture = np.full((1, 50, 70), 16, np.uint8)
    picture[:, 20:30, 30:40] = 235
    path = encode("odd.mkv", picture)
    with FrameReader(path, scan(path), CropConfig(height=16, width=32)) as reader:
        shown = reader.read(0)
    assert shown.shape == (48, 64, 3)
    rows, columns = np.nonzero(shown[..., 0] > 128)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (19, 28, 27, 36)


def test_a_phone_held_upright_gives_upright_clips(encode: Callable[..., Path]) -> None:
    picture = np.full((1, 32, 64), 16, np.uint8)
    picture[:, :8, :16] = 235
    path = encode("turned.mp4", picture)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    for slot, value in zip((0, 1, 3, 4), (0, 1, -1, 0), strict=True):
        content[at + 4 * slot : at + 4 * slot + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    info = scan(path)
    assert info.shown_size == (64, 32)
    with FrameReader(path, info, CropConfig()) as reader:
        shown = reader.read(0)
    assert shown.shape == (64, 32, 3)
    assert (shown[:16, -8:, 0] > 128).all()
    assert not (shown[16:, :, 0] > 128).any()


def test_pixels_that_are_not_square_become_so(encode: Callable[..., Path]) -> None:
    path = encode("anamorphic.mp4", ramp(1, 32, 32), pixel_aspect="2/1")
    with FrameReader(path, scan(path), CropConfig()) as reader:
        assert reader.read(0).shape == (32, 64, 3)


def test_clips_go_on_behind_frames_that_cannot_be_decoded(encode: Callable[..., Path]) -> None:
    pictures = np.random.default_rng(0).integers(16, 235, (12, 32, 32), np.uint8)
    path = encode("damaged.mp4", pictures, g="1")
    content = bytearray(path.read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    fifth = start + (end - start) * 5 // 12
    content[fifth : fifth + 600] = bytes(600)
    path.write_bytes(content)
    cut = CutConfig(clip_frames=3)
    with FrameReader(path, scan(path), CropConfig()) as reader:
        found = list(read_clips(reader, range(12), cut, CropConfig()))
    assert [type(item) for item in found] == [Pixels, LostFrames, Pixels, Pixels]
    assert [item.frames for item in found if isinstance(item, Pixels)] == [(0, 1, 2), (6, 7, 8), (9, 10, 11)]
    lost = found[1]
    assert isinstance(lost, LostFrames)
    assert (lost.count, lost.too_short) == (3, False)
    whole = encode("whole.mp4", pictures, g="1")
    assert torch.equal(found[2].pixels, decode_clip(whole, 3, 32, 32, start=6))


def test_scenes_end_clips(encode: Callable[..., Path]) -> None:
    levels = np.concatenate([ramp(5), ramp(4)[::-1] + 120, ramp(6)])
    path = encode("scenes.mp4", levels)
    cut = CutConfig(clip_frames=4, min_frames=2, scene_threshold=27)
    with FrameReader(path, scan(path), CropConfig()) as reader:
        found = list(read_clips(reader, range(15), cut, CropConfig()))
    assert [item.frames for item in found if isinstance(item, Pixels)] == [
        (0, 1, 2, 3),
        (5, 6, 7, 8),
        (9, 10, 11, 12),
        (13, 14),
    ]
    assert [item.count for item in found if isinstance(item, LostFrames)] == [1]


def test_clips_on_the_fly_keep_sizes_and_lengths(encode: Callable[..., Path]) -> None:
    wide = encode("wide.mp4", ramp(11, 32, 64))
    encode("tall.mp4", ramp(4, 64, 32))
    encode("tiny.mp4", ramp(8, 16, 16))
    (wide.parent / "broken.mp4").write_text("no video")
    files = [CaptionedFile(file=f"{name}.mp4", captions=(name,)) for name in ("wide", "broken", "tall", "tiny", "none")]
    clips = NativeClips(
        wide.parent, files, cut=CutConfig(clip_frames=8), crop=CropConfig(frames=2, height=32, width=32)
    )
    assert clips.sizes == [(8, 32, 64), (2, 32, 64), (4, 64, 32)]
    assert [name for name, _ in clips.skipped] == ["broken.mp4", "tiny.mp4", "none.mp4"]
    assert "smaller than 32x32" in clips.skipped[1][1]
    for index, size in enumerate(clips.sizes):
        assert clips[index].latents.shape == (*size, 3)
    assert (clips[1].start, clips[1].source, clips[1].captions, clips[1].fps) == (8, "wide.mp4", ("wide",), 25)
    assert number((clips[1].latents[0] + 1) * 127.5) == 8
    again = NativeClips(wide.parent, files[:1], cut=CutConfig(clip_frames=8), crop=CropConfig(frames=2, height=32))
    assert clips.digest != again.digest


def test_an_autoencoder_on_the_fly(encode: Callable[..., Path], tiny_model: Callable[[str], Path]) -> None:
    path = encode("a.mp4", ramp(8, 32, 48))
    model = build_autoencoder(AutoencoderConfig(autoencoder="vqvae", autoencoder_path=str(tiny_model("vqvae"))))
    files = [CaptionedFile(file="a.mp4", captions=("x",))]
    crop = CropConfig(frames=2, height=8, width=8)
    clips = NativeClips(path.parent, files, cut=CutConfig(), crop=crop, autoencoder=model)
    assert clips.sizes == [(4, 8, 12)]
    assert clips[0].latents.shape == (4, 8, 12, clips.channels)


def test_real_videos_in_their_own_size(sample_videos: Path) -> None:
    files = load_captions(sample_videos / "captions.json")
    clips = NativeClips(
        sample_videos, files, cut=CutConfig(clip_frames=16), crop=CropConfig(frames=2, height=16, width=16)
    )
    assert clips.skipped == []
    assert {size[1:] for size in clips.sizes} == {(256, 480), (720, 1280), (128, 128)}
    assert len(clips) == 25 + 2 + 1


def test_nothing_usable_and_scenes_are_refused(tmp_path: Path) -> None:
    files = [CaptionedFile(file="../a.mp4", captions=("x",))]
    with pytest.raises(ValueError, match=r"none of 1 videos gives a clip; the first: .*leaves the folder"):
        NativeClips(tmp_path, files, cut=CutConfig(), crop=CropConfig())
    with pytest.raises(ValueError, match=r"scene_threshold is for data/prepare\.py"):
        NativeClips(tmp_path, files, cut=CutConfig(scene_threshold=27), crop=CropConfig())
