"""longreel.data.video: frame-exact reading, colours, geometry, bad files, mp4 writing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image

from longreel.data.mp4 import write_mp4
from longreel.data.pictures import read_clip
from longreel.data.video import VideoError, probe, scan
from longreel.models.autoencoders import psnr


def ramp(num_frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame i is flat grey of level 40 + 4 * i."""
    return np.broadcast_to((40 + 4 * np.arange(num_frames, dtype=np.uint8))[:, None, None], (num_frames, height, width))


def frame_numbers(clip: torch.Tensor) -> list[int]:
    """Which frames of a limited-range ramp these are, from their mean luma."""
    luma = (clip.mean(dim=(1, 2, 3)) + 1) / 2 * 219 + 16
    return ((luma - 40) / 4).round().int().tolist()


@pytest.mark.parametrize(
    ("name", "codec", "num_frames", "size"),
    [
        ("nasa_13013.mp4", "h264", 390, (480, 270)),
        ("bt709_full_range.mp4", "h264", 30, (1280, 720)),
        ("h265_video.mp4", "hevc", 10, (128, 128)),
    ],
)
def test_real_file(sample_videos: Path, name: str, codec: str, num_frames: int, size: tuple[int, int]) -> None:
    info = probe(sample_videos / name)
    assert (info.codec, info.num_frames, (info.width, info.height)) == (codec, num_frames, size)
    clip = read_clip(sample_videos / name, 8, 40, 64, info=info)
    assert clip.shape == (8, 40, 64, 3)
    assert clip.dtype == torch.float32
    assert clip.min() >= -1
    assert clip.max() <= 1
    assert clip.std() > 0.1
    assert torch.equal(clip, read_clip(sample_videos / name, 8, 40, 64))


@pytest.mark.parametrize("name", ["nasa_13013.mp4", "h265_video.mp4"])
def test_real_file_frames_are_the_same_from_any_start(sample_videos: Path, name: str) -> None:
    info = probe(sample_videos / name)
    whole = read_clip(sample_videos / name, info.num_frames, 16, 16, info=info)
    for start in (1, 3, info.num_frames // 2, info.num_frames * 2 // 3, info.num_frames - 2):
        part = read_clip(sample_videos / name, 2, 16, 16, start=start, info=info)
        assert torch.equal(part, whole[start : start + 2]), f"start {start}"


def test_full_range_keeps_the_darkest_and_brightest_levels(sample_videos: Path) -> None:
    path = sample_videos / "bt709_full_range.mp4"
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        y, u, v = (
            np.frombuffer(bytes(p), np.uint8).reshape(p.height, p.line_size)[:, : p.width].astype(np.float64)
            for p in frame.planes
        )
    u, v = (np.repeat(np.repeat(c, 2, 0), 2, 1) - 128 for c in (u, v))
    # Full-range BT.709: Y in 0..255, Cb and Cr centred on 128 with unit gain.
    expected = np.stack([y + 1.5748 * v, y - 0.1873 * u - 0.4681 * v, y + 1.8556 * u], -1).clip(0, 255)
    ours = (read_clip(path, 1, 720, 1280)[0].numpy() + 1) * 127.5
    # Chroma edges are interpolated differently; read as limited range the mean difference is above 9 levels.
    assert np.abs(ours - expected).mean() < 1


@pytest.mark.parametrize("full_range", [False, True], ids=["limited", "full"])
def test_range_tag_of_the_file_is_obeyed(encode: Callable[..., Path], full_range: bool) -> None:
    levels = np.stack([np.full((32, 32), level, np.uint8) for level in (16, 128, 235)])
    clip = read_clip(encode("range.mp4", levels, full_range=full_range), 3, 32, 32)
    black, grey, white = ((clip.mean(dim=(1, 2, 3)) + 1) * 127.5).tolist()
    expected = (16, 128, 235) if full_range else (0, 130.4, 255)
    assert (black, grey, white) == pytest.approx(expected, abs=1.5)


def test_frames_are_strided_from_start(encode: Callable[..., Path]) -> None:
    path = encode("ramp.mp4", ramp(40), g="7", bf="3")
    assert frame_numbers(read_clip(path, 4, 32, 48, start=5, stride=9)) == [5, 14, 23, 32]
    assert frame_numbers(read_clip(path, 1, 32, 48, start=39)) == [39]


@pytest.mark.parametrize("name", ["ramp.mp4", "ramp.mkv", "ramp.ts"])
def test_every_start_is_exact_with_open_groups_and_b_frames(encode: Callable[..., Path], name: str) -> None:
    path = encode(name, ramp(40), g="8", bf="3", **{"x264-params": "open-gop=1:b-pyramid=2"})
    info = probe(path)
    assert len(info.keyframes) > 2
    for start in range(40):
        assert frame_numbers(read_clip(path, 1, 32, 48, start=start, info=info)) == [start]


def test_variable_frame_rate_counts_frames_not_seconds(encode: Callable[..., Path]) -> None:
    path = encode("vfr.mkv", ramp(20), times=[i * i for i in range(20)], g="4")
    assert frame_numbers(read_clip(path, 5, 32, 48, start=9, stride=2)) == [9, 11, 13, 15, 17]


def test_average_rate_is_that_of_the_time_stamps(encode: Callable[..., Path]) -> None:
    # In hundredths of a second, at the encoder's 25 frames per second.
    path = encode("vfr.mkv", ramp(20), times=[4 * i * i for i in range(20)])
    assert probe(path).fps == pytest.approx(19 / (4 * 19 * 19 / 100), rel=1e-3)
    assert probe(encode("even.mkv", ramp(20))).fps == 25


def test_file_without_timestamps_is_read_from_its_start(encode: Callable[..., Path]) -> None:
    path = encode("raw.h264", ramp(20), format="h264", g="5", bf="2")
    assert probe(path).num_frames == 20
    assert frame_numbers(read_clip(path, 3, 32, 48, start=11)) == [11, 12, 13]


def test_centre_is_kept_and_aspect_preserved(encode: Callable[..., Path]) -> None:
    picture = np.full((1, 64, 192), 16, np.uint8)
    picture[:, 16:48, 80:112] = 235
    clip = read_clip(encode("wide.mp4", picture), 1, 32, 32)[0, :, :, 0]
    bright = (clip > 0).float()
    assert bright.sum(0).max() == bright.sum(1).max() == 16
    assert bright[8:24, 8:24].mean() == 1


def test_pixels_that_are_not_square_are_stretched(encode: Callable[..., Path]) -> None:
    picture = np.full((1, 64, 64), 16, np.uint8)
    picture[:, 24:40, 28:36] = 235
    clip = read_clip(encode("anamorphic.mp4", picture, pixel_aspect="2/1"), 1, 64, 64)[0, :, :, 0]
    bright = (clip > 0).float()
    assert bright.sum(0).max() == pytest.approx(16, abs=1)
    assert bright.sum(1).max() == pytest.approx(16, abs=1)


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [((0, 1, -1, 0), "top right"), ((-1, 0, 0, -1), "bottom right"), ((0, -1, 1, 0), "bottom left")],
    ids=["90-clockwise", "180", "90-counterclockwise"],
)
def test_stored_rotation_is_applied(encode: Callable[..., Path], matrix: tuple[int, ...], corner: str) -> None:
    picture = np.full((1, 32, 64), 16, np.uint8)
    picture[:, :8, :16] = 235
    path = encode("turned.mp4", picture)
    # The display matrix (a, b, u, c, d, v, x, y, w) of the track header, as a phone held upright writes it.
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    for slot, value in zip((0, 1, 3, 4), matrix, strict=True):
        content[at + 4 * slot : at + 4 * slot + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    height, width = (32, 64) if matrix[0] else (64, 32)
    clip = read_clip(path, 1, height, width)[0, :, :, 0]
    rows, columns = (clip > 0).float().nonzero().float().mean(0).tolist()
    assert ("bottom" if rows > height / 2 else "top") + (" right" if columns > width / 2 else " left") == corner


def test_too_few_frames_says_how_many_there_are(encode: Callable[..., Path]) -> None:
    path = encode("short.mp4", ramp(10))
    with pytest.raises(VideoError, match=r"short\.mp4: has 10 frames; 4 at stride 3 from frame 1 need 11"):
        read_clip(path, 4, 32, 32, start=1, stride=3)


@pytest.mark.parametrize(
    "argument", [{"num_frames": 0}, {"height": 0}, {"width": -1}, {"stride": 0}, {"start": -1}], ids=str
)
def test_argument_out_of_range(tmp_path: Path, argument: dict[str, int]) -> None:
    name = next(iter(argument))
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        read_clip(tmp_path / "x.mp4", **({"num_frames": 1, "height": 8, "width": 8} | argument))


def make_audio(path: Path) -> None:
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))


def test_bad_files_are_named_with_the_reason(tmp_path: Path, encode: Callable[..., Path]) -> None:
    (tmp_path / "text.mp4").write_text("this is not a video\n" * 50)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    make_audio(tmp_path / "sound.wav")
    whole = encode("whole.mp4", ramp(10)).read_bytes()
    (tmp_path / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    encode("no_frames.mp4", ramp(10)[:0])
    reasons = {
        "missing.mp4": "no such file",
        "folder.mp4": "is not a file",
        "text.mp4": "Invalid data",
        "empty.mp4": "Invalid data",
        "truncated.mp4": "Invalid data",
        "sound.wav": "no video stream",
        "no_frames.mp4": "",
    }
    for name, reason in reasons.items():
        with pytest.raises(VideoError, match=re.escape(str(tmp_path / name)) + ": .*" + reason) as raised:
            read_clip(tmp_path / name, 1, 8, 8)
        assert "\n" not in str(raised.value)


def test_files_that_lie_about_what_they_are(tmp_path: Path, encode: Callable[..., Path]) -> None:
    video = encode("real.mp4", ramp(5))
    (tmp_path / "video.txt").write_bytes(video.read_bytes())
    (tmp_path / "http:video.mp4").write_bytes(video.read_bytes())
    assert scan(tmp_path / "video.txt").num_frames == scan(tmp_path / "http:video.mp4").num_frames == 5
    for kind in ("png", "jpeg"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{kind}.mp4", kind)
    # Both would make FFmpeg open another file.
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile '{video}'\n")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:{video}\n#EXT-X-ENDLIST\n"
    (tmp_path / "playlist.mp4").write_text(playlist)
    for name in ("png.mp4", "jpeg.mp4", "concat.mp4"):
        with pytest.raises(VideoError, match="is in no format of videos that is read"):
            scan(tmp_path / name)
    with pytest.raises(VideoError, match="Invalid data"):
        scan(tmp_path / "playlist.mp4")


def test_cover_of_a_sound_file_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        sound, cover = container.add_stream("aac", rate=8000), container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        cover.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode(None))
        container.mux(sound.encode(None))
    with pytest.raises(VideoError, match="holds no video stream that can be decoded"):
        scan(path)


def test_scan_says_what_probe_says_and_meets_no_later_frame(encode: Callable[..., Path]) -> None:
    path = encode("clip.mp4", ramp(20), g="5", bf="2", pixel_aspect="3/2")
    assert scan(path) == probe(path)
    assert scan(path).shown_size == (32, 72)
    pictures = np.random.default_rng(0).integers(16, 235, (12, 32, 32), np.uint8)
    path = encode("damaged.mp4", pictures, g="1")
    content = bytearray(path.read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[(start + end) // 2 : end] = bytes(end - (start + end) // 2)
    path.write_bytes(content)
    assert scan(path).num_frames == 12


def test_frames_that_do_not_decode_are_an_error(encode: Callable[..., Path]) -> None:
    path = encode("damaged.mp4", np.random.default_rng(0).integers(16, 235, (12, 32, 32), np.uint8), g="1")
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    end = content.index(b"moov") - 4
    content[(start + end) // 2 : end] = bytes(end - (start + end) // 2)
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"damaged\.mp4: "):
        probe(path)
    with pytest.raises(VideoError, match=r"damaged\.mp4: "):
        read_clip(path, 12, 32, 32)


def smooth(num_frames: int, height: int, width: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    fine = torch.nn.functional.interpolate(coarse, size=(num_frames, height, width), mode="trilinear")
    return fine[0].permute(1, 2, 3, 0)


@pytest.mark.parametrize("size", [(9, 64, 96), (5, 33, 47)], ids=["even", "odd"])
def test_mp4_round_trip(tmp_path: Path, size: tuple[int, int, int]) -> None:
    frames = smooth(*size)
    path = tmp_path / "out.mp4"
    encoder = write_mp4(path, frames, 29.97)
    num_frames, height, width = size
    info = probe(path)
    assert encoder in ("libx264", "mpeg4")
    assert info.num_frames == num_frames
    assert info.fps == pytest.approx(29.97, rel=1e-3)
    assert (info.height, info.width) == (height + height % 2, width + width % 2)
    again = read_clip(path, num_frames, info.height, info.width)[:, :height, :width]
    assert psnr(again, frames) > 32
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("color", [(0.8, -0.5, 0.1), (-0.9, -0.9, 0.6), (1, 1, 1)], ids=str)
def test_flat_colour_survives(tmp_path: Path, color: tuple[float, float, float]) -> None:
    write_mp4(tmp_path / "out.mp4", torch.tensor(color).expand(1, 1, 1, 3), 8)
    again = read_clip(tmp_path / "out.mp4", 1, 2, 2)
    assert again.view(-1, 3).mean(0).tolist() == pytest.approx(color, abs=0.03)


def test_values_outside_the_range_are_clipped(tmp_path: Path) -> None:
    write_mp4(tmp_path / "out.mp4", torch.full((2, 16, 16, 3), 7.0), 8)
    assert read_clip(tmp_path / "out.mp4", 2, 16, 16).mean() > 0.98


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        pytest.param(torch.zeros(2, 16, 16), 8, r"frames must be \[T, H, W, 3\]", id="no-channels"),
        pytest.param(torch.zeros(0, 16, 16, 3), 8, "not empty", id="empty"),
        pytest.param(torch.zeros(2, 16, 16, 3), 0, "fps must be between 0.1 and 1000, got 0", id="fps-zero"),
        pytest.param(torch.full((2, 16, 16, 3), float("nan")), 8, "not finite", id="nan"),
    ],
)
def test_write_refuses(tmp_path: Path, frames: torch.Tensor, fps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_mp4(tmp_path / "out.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", fail)
    with pytest.raises(OSError, match="No space left"):
        write_mp4(path, torch.zeros(2, 16, 16, 3), 8)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_missing_output_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_mp4(tmp_path / "nowhere" / "out.mp4", torch.zeros(2, 16, 16, 3), 8)
