"""data/shards.py: what was prepared is read back to the byte, and damage is named."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from longreel.data.cutting import CropConfig, CutConfig
from longreel.data.native import FrameReader
from longreel.data.pictures import to_float
from longreel.data.prepare_config import PrepareConfig
from longreel.data.prepare_run import prepare
from longreel.data.shard_files import COLUMNS, ShardError, checksum, read_rows
from longreel.data.shards import ShardDataset
from longreel.data.video import scan
from longreel.models.autoencoders import AutoencoderConfig, build_autoencoder, psnr
from longreel.models.text import TextEncoderConfig, build_text_encoder

CUT = CutConfig(clip_frames=4)


@pytest.fixture
def videos(encode: Callable[..., Path]) -> Path:
    generator = np.random.default_rng(0)
    for name, shape in (("a.mp4", (10, 32, 48)), ("b.mp4", (4, 40, 36))):
        path = encode(name, generator.integers(16, 235, shape, np.uint8))
    folder = path.parent
    entries = [{"file": "b.mp4", "captions": ["b"]}, {"file": "a.mp4", "captions": ["one", "two"]}]
    (folder / "captions.json").write_text(json.dumps(entries))
    return folder


def make(videos: Path, out: str = "out", **options: object) -> Path:
    folder = videos / out
    fields = {"cut": CUT, "processes": 1} | options
    prepare(PrepareConfig(videos=videos, captions=videos / "captions.json", out=folder, **fields))
    return folder


def test_raw_clips_are_the_videos_pixels(videos: Path) -> None:
    clips = ShardDataset(make(videos))
    assert [(clip.source, clip.start) for clip in clips] == [("a.mp4", 0), ("a.mp4", 4), ("a.mp4", 8), ("b.mp4", 0)]
    assert clips.sizes == [(4, 32, 48), (4, 32, 48), (2, 32, 48), (4, 40, 36)]
    assert clips.tokens == [4 * 16 * 24, 4 * 16 * 24, 2 * 16 * 24, 4 * 20 * 18]
    assert (clips.channels, clips.null_text) == (3, None)
    for clip in clips:
        path = videos / clip.source
        with FrameReader(path, scan(path), CropConfig()) as reader:
            frames = range(clip.start, clip.start + len(clip.latents))
            pixels = torch.from_numpy(np.stack([reader.read(i) for i in frames]))
        assert torch.equal(clip.latents, to_float(pixels))
        assert clip.text is None
        assert clip.fps == 25
    assert clips[1].captions == ("one", "two")
    clips.check()


def test_round_trip_of_real_videos_through_raw_shards_is_exact(sample_videos: Path, tmp_path: Path) -> None:
    config = PrepareConfig(
        videos=sample_videos,
        captions=sample_videos / "captions.json",
        out=tmp_path / "out",
        cut=CutConfig(clip_frames=4, frame_stride=60),
        processes=1,
    )
    prepare(config)
    clips = ShardDataset(tmp_path / "out")
    assert {clip.source for clip in clips} == {"nasa_13013.mp4", "bt709_full_range.mp4", "h265_video.mp4"}
    raw = build_autoencoder(AutoencoderConfig())
    for clip in clips:
        path = sample_videos / clip.source
        with FrameReader(path, scan(path), CropConfig(height=2, width=2)) as reader:
            pixels = np.stack([reader.read(clip.start + 60 * i) for i in range(len(clip.latents))])
        assert psnr(raw.decode(clip.latents[None])[0], to_float(torch.from_numpy(pixels))) == float("inf")


@pytest.mark.parametrize("name", ["vqvae", "sd-vae"])
@pytest.mark.parametrize("text", ["t5", "clip"])
def test_encoded_clips_are_what_the_encoders_give(
    videos: Path, tiny_model: Callable[[str], Path], name: str, text: str
) -> None:
    compression = AutoencoderConfig(autoencoder=name, autoencoder_path=str(tiny_model(name)))
    encoder = TextEncoderConfig(text_encoder=text, text_path=str(tiny_model(text)), max_text_tokens=6)
    folder = make(videos, compression=compression, text=encoder, latent_dtype="fp32")
    clips, model, words = ShardDataset(folder), build_autoencoder(compression), build_text_encoder(encoder)
    assert clips.channels == 4
    assert clips.sizes[0] == (4 // model.time_factor, 8, 12)
    clip = clips[1]
    path = videos / "a.mp4"
    with FrameReader(path, scan(path), CropConfig()) as reader:
        pixels = torch.from_numpy(np.stack([reader.read(i) for i in range(4, 8)]))
    torch.testing.assert_close(clip.latents, model.encode(to_float(pixels)[None])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(clip.text, words.encode(["one", "two"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(clips.null_text, words.encode([""])[0], rtol=0, atol=1e-5)
    assert clips[3].text.shape == (1, 6, 16)
    # 36 pixels are 9 latent columns, and patches are 2 wide.
    assert clips.sizes[3][2] == 8


def test_half_precision_latents_are_near(videos: Path, tiny_model: Callable[[str], Path]) -> None:
    compression = AutoencoderConfig(autoencoder="sd-vae", autoencoder_path=str(tiny_model("sd-vae")))
    whole = ShardDataset(make(videos, "whole", compression=compression, latent_dtype="fp32"))[0].latents
    half = ShardDataset(make(videos, "half", compression=compression))[0].latents
    assert half.dtype == torch.float32
    assert 0 < (whole - half).abs().max() < 2e-3


def test_index_has_its_columns(videos: Path) -> None:
    rows, notes = read_rows(make(videos) / "index.parquet")
    assert list(rows[0]) == [name for name, _, _ in COLUMNS]
    assert rows[0]["checksum"] != rows[1]["checksum"]
    assert notes["fingerprint"]


def test_checksum_sees_every_bit_shape_and_dtype() -> None:
    latents = torch.arange(24, dtype=torch.float16).reshape(2, 3, 4)
    text = torch.ones(2, 2)
    seen = {checksum(latents, text), checksum(latents.reshape(3, 2, 4), text), checksum(latents, None)}
    seen |= {checksum(latents.view(torch.bfloat16), text), checksum(latents, text * 2)}
    assert len(seen) == 5


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["data", "header", "length", "cut", "gone"])
def test_damaged_shard_is_named(videos: Path, where: str) -> None:
    folder = make(videos)
    shards = sorted((folder / "shards").iterdir())
    assert len(shards) == 2
    size = shards[1].stat().st_size
    if where == "gone":
        shards[1].unlink()
    elif where == "cut":
        shards[1].write_bytes(shards[1].read_bytes()[: size // 2])
    else:
        flip(shards[1], {"data": size - 1, "header": 12, "length": 1}[where])
    clips = ShardDataset(folder)
    assert clips[0].latents.shape == (4, 32, 48, 3)
    with pytest.raises(ShardError, match=str(shards[1])) as raised:
        clips[3]
    assert "\n" not in str(raised.value)
    with pytest.raises(ShardError, match=str(shards[1])):
        clips.check()
    if where == "data":
        assert "clip 3 (b.mp4) does not match its checksum" in str(raised.value)
        assert ShardDataset(folder, verify=False)[3].latents.shape == (4, 40, 36, 3)


def test_a_shard_that_is_cut_off_or_unreadable_after_it_was_opened_is_named(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(videos)
    shard = folder / "shards" / "00000-00.safetensors"
    clips = ShardDataset(folder)
    first = clips[0].latents
    os.truncate(shard, shard.stat().st_size // 2)
    assert torch.equal(clips[0].latents, first)
    with pytest.raises(ShardError, match=f"{shard}: damaged: clip 2 cannot be read: it is "):
        clips[2]

    def broken_disk(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken_disk)
    for shard_of, clip in (("00000-00", 0), ("00001-00", 3)):
        with pytest.raises(ShardError, match=rf"{shard_of}\.safetensors: damaged: clip {clip} .*Input/output error"):
            clips[clip]


def test_any_flipped_byte_of_a_text_feature_is_seen(videos: Path, tiny_model: Callable[[str], Path]) -> None:
    text = TextEncoderConfig(text_encoder="clip", text_path=str(tiny_model("clip")), max_text_tokens=4)
    folder = make(videos, text=text)
    shard = next(iter(sorted((folder / "shards").iterdir())))
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    tensors = json.loads(shard.read_bytes()[8:header])
    flip(shard, header + tensors["text.00000"]["data_offsets"][0] + 3)
    with pytest.raises(ShardError, match="does not match its checksum"):
        ShardDataset(folder)[0]


def test_folders_that_are_not_prepared_are_refused(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"holds no dataset\.json; prepare it with data/prepare\.py"):
        ShardDataset(tmp_path)
    folder = make(videos)
    flip(folder / "index.parquet", 200)
    with pytest.raises(ShardError, match=r"index\.parquet: damaged"):
        ShardDataset(folder)
    (folder / "index.parquet").unlink()
    with pytest.raises(ShardError, match="not finished"):
        ShardDataset(folder)
    shutil.copy(make(videos, "other", patch_size=(1, 4, 4)) / "index.parquet", folder)
    with pytest.raises(ShardError, match="belongs to another preparation"):
        ShardDataset(folder)
    (folder / "dataset.json").write_text('{"format": 99}')
    with pytest.raises(ShardError, match="not of format 1"):
        ShardDataset(folder)


def test_index_out_of_range(videos: Path) -> None:
    clips = ShardDataset(make(videos))
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"clip {index} of 4"):
            clips[index]


def test_digest_names_clips_and_captions_not_the_place(videos: Path) -> None:
    one, two = ShardDataset(make(videos)), ShardDataset(make(videos, "two"))
    assert one.digest == two.digest
    (videos / "captions.json").write_text(json.dumps([{"file": "a.mp4", "captions": ["one", "other"]}]))
    assert ShardDataset(make(videos, "three")).digest != one.digest
