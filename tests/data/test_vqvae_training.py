"""data/vqvae_training.py: a brief training compresses real videos, the same every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from longreel.data.pictures import to_float
from longreel.data.video import scan
from longreel.data.vqvae_training import RandomCrops, VQVAETrainConfig, read_stretch, train_vqvae
from longreel.models.autoencoders import AutoencoderConfig, build_autoencoder, psnr
from longreel.models.vqvae import VQVAE, VQVAEConfig

TINY = VQVAEConfig(hidden=8, channels=4, codebooks=2, codebook_size=32, res_blocks=0)


@pytest.fixture
def videos(encode: Callable[..., Path]) -> Path:
    generator = np.random.default_rng(0)
    for name, size in (("a.mp4", (48, 64)), ("b.mp4", (32, 32)), ("tiny.mp4", (16, 16))):
        small = generator.integers(60, 190, (1, size[0] // 8, size[1] // 8), np.uint8)
        levels = small.repeat(8, 1).repeat(8, 2).repeat(8, 0)
        # Stripes inside every patch, which its mean colour does not tell.
        levels[:, :, ::2] -= 40
        levels[:, :, 1::2] += 40
        path = encode(name, levels)
    (path.parent / "broken.mp4").write_text("no video")
    return path.parent


def config(videos: Path, out: str, **options: object) -> VQVAETrainConfig:
    fields = {"steps": 12, "batch_size": 2, "frames": 4, "crop": 30, "device": "cpu", "model": TINY} | options
    return VQVAETrainConfig(videos=videos, out=videos / out, **fields)


def test_training_learns_and_is_the_same_every_time(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    model = train_vqvae(config(videos, "one", steps=24, learning_rate=3e-3))
    assert torch.equal(torch.get_rng_state(), before)
    told = capsys.readouterr().err
    assert "broken.mp4: " in told
    assert "tiny.mp4: 8 frames of 16x16 are less than a crop" in told
    assert "dB over the middle 64x48 pixels of its first 8 of 8 frames" in told
    losses = [json.loads(line)["loss"] for line in (videos / "one" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 24
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])
    train_vqvae(config(videos, "two", steps=24, learning_rate=3e-3))
    for name in ("vqvae.safetensors", "vqvae.json", "metrics.jsonl"):
        assert (videos / "one" / name).read_bytes() == (videos / "two" / name).read_bytes()
    loaded = build_autoencoder(AutoencoderConfig(autoencoder="vqvae", autoencoder_path=str(videos / "one")))
    clip = to_float(read_stretch(videos / "a.mp4", scan(videos / "a.mp4"), 0, 8))[None]
    assert torch.equal(loaded.encode(clip), model.encode(clip))
    latents = loaded.encode(clip).flatten(0, -2)
    assert latents.mean(0).abs().max() < 1
    assert 0.3 < latents.std() < 3


def test_what_is_measured_at_the_end_is_bounded_and_said(
    videos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("_CHECKED_VIDEOS", 1), ("_CHECKED_FRAMES", 5), ("_CHECKED_SIDE", 30)):
        monkeypatch.setattr(f"longreel.data.vqvae_training.{name}", value)
    seen = []
    encode = VQVAE.encode
    monkeypatch.setattr(VQVAE, "encode", lambda model, video: seen.append(list(video.shape)) or encode(model, video))
    train_vqvae(config(videos, "out", steps=1))
    told = capsys.readouterr().err
    # Multiples of the model's factors, 2 and 4.
    assert seen == [[1, 4, 28, 28, 3]]
    assert "a.mp4: " in told
    assert "over the middle 28x28 pixels of its first 4 of 8 frames" in told
    assert "1 more videos were not measured" in told


def test_crops_come_from_every_video_and_place(videos: Path) -> None:
    crops = RandomCrops(videos, frames=4, side=32, batch_size=4, seed=0)
    assert [path.name for path, _ in crops.videos] == ["a.mp4", "b.mp4"]
    batches = [batch for _, batch in zip(range(10), crops, strict=False)]
    assert all(batch.shape == (4, 4, 32, 32, 3) for batch in batches)
    assert len({batch[0, 0].sum().item() for batch in batches}) > 5
    again = next(iter(RandomCrops(videos, frames=4, side=32, batch_size=4, seed=0)))
    assert torch.equal(again, batches[0])


def test_folders_without_a_usable_video_are_refused(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no video has 4 frames of 100x100 pixels; the first: .*a\.mp4: 8 frames of 64x48"
    ):
        RandomCrops(videos, frames=4, side=100, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="is not a folder"):
        RandomCrops(tmp_path / "nothing", frames=4, side=8, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        config(videos, "x", steps=0)


def test_loss_that_is_not_finite_saves_nothing(videos: Path) -> None:
    with pytest.raises(ValueError, match=r"not finite at step \d+; use a learning_rate below 1e\+30"):
        train_vqvae(config(videos, "out", learning_rate=1e30, save_every=100))
    assert not (videos / "out" / "vqvae.safetensors").exists()


@pytest.mark.slow
def test_a_brief_training_brings_a_real_video_back(sample_videos: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    path = tmp_path / "videos" / "h265_video.mp4"
    path.symlink_to(sample_videos / path.name)
    sizes = {"steps": 60, "batch_size": 4, "frames": 4, "crop": 32}
    train_vqvae(VQVAETrainConfig(videos=path.parent, out=tmp_path, device="cpu", model=VQVAEConfig(hidden=16), **sizes))
    trained = build_autoencoder(AutoencoderConfig(autoencoder="vqvae", autoencoder_path=str(tmp_path)))
    video = to_float(read_stretch(path, scan(path), 0, 10))[None]
    # Measured 23.8 dB; the mean colours of patches alone give 19.7.
    assert psnr(trained.decode(trained.encode(video)), video) > 22
