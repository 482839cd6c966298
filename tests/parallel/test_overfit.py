"""A model trained here samples the clip it was trained on, and puts its parts where they belong.

The command lines, from videos to an mp4, with pixels and with a VQ-VAE, on a drawn clip and on a real one: `pytest -m
slow -s tests/parallel/test_overfit.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longreel.data.command_line import parse_arguments
from longreel.data.demo import make_demo_folder
from longreel.data.mp4 import write_mp4
from longreel.data.pictures import read_clip
from longreel.data.shards import ShardDataset
from longreel.data.video import scan
from longreel.models.autoencoders import psnr
from longreel.models.vqvae import load_vqvae
from longreel.parallel.launch import process_group
from longreel.parallel.presets import with_preset
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.sample import sample_video
from longreel.parallel.sample_config import SampleConfig
from longreel.parallel.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_VIDEOS = ROOT.parent / "shared" / "data"
# dB of the sampled clip to the one that was trained.
BAR = 25.0


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More would wait for each other: the model is small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def one_clip(folder: Path, *, num_frames: int = 32, size: int = 64) -> str:
    """A folder with one drawn clip, its other files left out of the captions; the caption."""
    captions = make_demo_folder(folder, num_frames=num_frames, size=size)
    entry = json.loads(captions.read_text())[0]
    captions.write_text(json.dumps([entry]))
    return str(entry["captions"][0])


def overfitted(folder: Path, *words: str) -> tuple[Tensor, Tensor]:
    """(sampled, trained) clip [T, H, W, 3] of the smoke preset's model, trained on one clip for fewer steps."""
    caption = one_clip(folder / "videos")
    preset = ["--preset", "smoke", "--videos", str(folder / "videos"), "--out", str(folder / "run")]
    config = parse_arguments(TrainConfig, with_preset([*preset, "--batch-size", "4", "--steps", "280", *words]))
    with process_group() as device:
        trainer = Trainer(config, device)
        trainer.train()
        video = sample_video(SampleConfig(checkpoint=config.out, prompt=(caption,), steps=20), device)
    return video, trainer.clips[0].latents


def test_a_clip_comes_back_with_everything_in_its_place(tmp_path: Path) -> None:
    found = psnr(*overfitted(tmp_path))
    print(f"{found:.1f} dB")
    assert found > BAR


@pytest.mark.slow
def test_faint_positions_leave_a_clip_in_pieces(tmp_path: Path) -> None:
    """That the test above can fail: colours and shapes are right, their places are not."""
    found = psnr(*overfitted(tmp_path, "--position-gain", "1"))
    print(f"{found:.1f} dB")
    assert found < BAR - 5


def command(script: str, *words: object) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def train(out: Path, *words: object) -> None:
    command("parallel/train.py", "--preset", "smoke", "--out", out, *words)


def sampled(run: Path, *captions: str) -> tuple[Tensor, ...]:
    """The clips [T, H, W, 3] in the mp4 that a run's model makes of captions, one row of it each."""
    mp4 = run / "clip.mp4"
    command("parallel/sample.py", "--checkpoint", run, "--prompt", *captions, "--out", mp4)
    info = scan(mp4)
    return read_clip(mp4, info.num_frames, *info.shown_size).chunk(len(captions), dim=1)


def real_clip(folder: Path, name: str) -> str:
    """A folder with one of the sample videos and its captions file; the caption."""
    if not (SAMPLE_VIDEOS / name).is_file():
        pytest.skip(f"the sample videos are not at {SAMPLE_VIDEOS}")
    folder.mkdir()
    shutil.copy(SAMPLE_VIDEOS / name, folder)
    entries = json.loads((SAMPLE_VIDEOS / "captions.json").read_text())
    caption = next(entry["captions"][0] for entry in entries if entry["file"] == name)
    (folder / "captions.json").write_text(json.dumps([{"file": name, "captions": [caption]}]))
    return str(caption)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_clip_of_the_demo_comes_from_its_caption(tmp_path: Path) -> None:
    train(tmp_path)
    entries = json.loads((tmp_path / "demo" / "captions.json").read_text())
    captions = [entry["captions"][0] for entry in entries]
    for entry, caption, video in zip(entries, captions, sampled(tmp_path, *captions), strict=True):
        found = psnr(video, read_clip(tmp_path / "demo" / entry["file"], 8, 32, 32, stride=4))
        print(f"{caption}: {found:.1f} dB")
        assert found > BAR


# What is drawn moves, what is real has detail: of the space telescope one clip of 8 frames over all of the video.
CLIPS = [("drawn", "red_square_right.mp4", 4, 400), ("real", "nasa_13013.mp4", 40, 700)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "name", "stride", "steps"), CLIPS, ids=[clip[0] for clip in CLIPS])
def test_pixels_from_the_command_line(tmp_path: Path, kind: str, name: str, stride: int, steps: int) -> None:
    videos = tmp_path / "videos"
    caption = one_clip(videos) if kind == "drawn" else real_clip(videos, name)
    choices = ["--frame-stride", stride, "--batch-size", 4, "--steps", steps]
    train(tmp_path / "run", "--videos", videos, *choices)
    (video,) = sampled(tmp_path / "run", caption)
    found = psnr(video, read_clip(videos / name, 8, 32, 32, stride=stride))
    print(f"{kind} clip, pixels: {found:.1f} dB")
    assert found > BAR


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "name", "size", "steps"),
    [("drawn", "red_square_right.mp4", 32, 500), ("real", "nasa_13013.mp4", 64, 1000)],
    ids=["drawn", "real"],
)
def test_latents_of_a_vqvae_trained_here_from_the_command_line(
    tmp_path: Path, kind: str, name: str, size: int, steps: int
) -> None:
    videos, shards, weights = tmp_path / "videos", tmp_path / "shards", tmp_path / "vqvae"
    if kind == "drawn":
        caption = one_clip(videos, num_frames=8, size=size)
    else:
        caption = real_clip(videos, name)
        # Shards keep the size of their videos, and this one's would take hours here.
        write_mp4(videos / name, read_clip(videos / name, 8, size, size, stride=40), 8)
    command("data/train_vqvae.py", videos, weights, "--steps", 300, "--crop", 32, "--batch-size", 4, "--hidden", 32)
    # As many patches as the preset's clips have, whatever the size.
    patch = [2, size // 16, size // 16]
    words = ["--clip-frames", 8, "--min-frames", 8, "--patch-size", *patch, "--autoencoder", "vqvae"]
    command("data/prepare.py", videos, videos / "captions.json", shards, *words, "--autoencoder-path", weights)
    clips = ShardDataset(shards)
    assert len(clips) == 1
    choices = ["--patch-size", *patch, "--token-budget", 32, "--batch-size", 1, "--steps", steps]
    train(tmp_path / "run", "--shards", shards, *choices)
    (video,) = sampled(tmp_path / "run", caption)
    decoded = load_vqvae(weights).decode(clips[0].latents[None].float())[0]
    source = read_clip(videos / name, 8, size, size)
    found, kept, whole = psnr(video, decoded), psnr(decoded, source), psnr(video, source)
    print(
        f"{kind} clip, VQ-VAE: {found:.1f} dB to its reconstruction, which is at {kept:.1f}; {whole:.1f} to the source"
    )
    assert found > BAR
    assert whole > BAR - 5
