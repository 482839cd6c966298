"""Training a VQ-VAE on random crops of videos, so that compression needs nothing but the videos at hand."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from longreel.data.clips import seeded_generator
from longreel.data.cutting import CropConfig
from longreel.data.native import FrameReader
from longreel.data.pictures import to_float
from longreel.data.sources import VIDEO_SUFFIXES
from longreel.data.video import VideoError, VideoInfo, scan
from longreel.models.autoencoders import psnr
from longreel.models.publish import published
from longreel.models.vqvae import VQVAE, VQVAEConfig, save_vqvae

# Decoded stretches that crops are taken from; every step decodes one more, and the oldest goes.
_POOL = 32
# Vectors of the latest batches that give the latents' mean and deviation.
_LATEST = 20
# What is compressed and brought back at the end, to say how well: videos, frames of each, pixels along a side.
_CHECKED_VIDEOS, _CHECKED_FRAMES, _CHECKED_SIDE = 3, 16, 256


@dataclass(frozen=True, kw_only=True, slots=True)
class VQVAETrainConfig:
    """Train a VQ-VAE on a folder of videos; no captions are needed.

    Args:
        videos: folder of video files.
        out: folder to write: vqvae.safetensors, vqvae.json, and metrics.jsonl.
        steps: optimizer steps.
        batch_size: crops per step.
        frames: frames of a crop, rounded up to the model's time factor.
        crop: height and width of a crop in pixels, rounded up to its space factor.
        learning_rate: of Adam, falling to a tenth by a cosine.
        seed: of weights and crops.
        save_every: steps between saves; the last step always saves.
        device: cpu, cuda or cuda:N; auto takes a GPU if there is one.
        model: sizes of the model.
    """

    videos: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    steps: int = 2000
    batch_size: int = 8
    frames: int = 8
    crop: int = 64
    learning_rate: float = 1e-3
    seed: int = 0
    save_every: int = 500
    device: str = "auto"
    model: VQVAEConfig = field(default_factory=VQVAEConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "frames", "crop", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")

    @property
    def crop_size(self) -> tuple[int, int]:
        """(frames, side) of a crop, multiples of the model's factors."""
        time, space = self.model.time_factor, self.model.space_factor
        return -(-self.frames // time) * time, -(-self.crop // space) * space

    @property
    def torch_device(self) -> torch.device:
        """Where the model trains."""
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(automatic if self.device == "auto" else self.device)


class RandomCrops:
    """Batches of crops [B, T, S, S, 3] in [-1, 1] of the videos of a folder, a function of the seed alone.

    Args:
        folder: of videos, searched with its subfolders.
        frames, side: T and S; smaller videos are left out, see skipped.

    Raises:
        ValueError: no video is large and long enough.
    """

    def __init__(self, folder: Path, *, frames: int, side: int, batch_size: int, seed: int) -> None:
        self.frames, self.side, self.batch_size, self.seed = frames, side, batch_size, seed
        self.videos: list[tuple[Path, VideoInfo]] = []
        self.skipped: list[str] = []
        if not folder.is_dir():
            raise ValueError(f"videos: {folder} is not a folder")
        for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES):
            try:
                info = scan(path)
            except VideoError as error:
                self.skipped.append(str(error))
                continue
            if info.num_frames < frames or min(info.shown_size) < side:
                height, width = info.shown_size
                self.skipped.append(f"{path}: {info.num_frames} frames of {width}x{height} are less than a crop")
                continue
            self.videos.append((path, info))
        if not self.videos:
            first = f"; the first: {self.skipped[0]}" if self.skipped else ""
            raise ValueError(f"{folder}: no video has {frames} frames of {side}x{side} pixels{first}")

    def __iter__(self) -> Iterator[Tensor]:
        generator = seeded_generator("vqvae", self.seed)
        pool: deque[Tensor] = deque(maxlen=_POOL)
        broken = 0
        while True:
            path, info = self.videos[self._draw(generator, len(self.videos))]
            start = self._draw(generator, info.num_frames - self.frames + 1)
            try:
                pool.append(read_stretch(path, info, start, self.frames))
                broken = 0
            except VideoError as error:
                broken += 1
                if broken >= 100:
                    raise VideoError(f"100 stretches in a row cannot be decoded, the last: {error}") from error
                continue
            yield torch.stack([self._crop(pool, generator) for _ in range(self.batch_size)])

    def _crop(self, pool: deque[Tensor], generator: torch.Generator) -> Tensor:
        stretch = pool[self._draw(generator, len(pool))]
        top, left = (self._draw(generator, size - self.side + 1) for size in stretch.shape[1:3])
        return to_float(stretch[:, top : top + self.side, left : left + self.side])

    @staticmethod
    def _draw(generator: torch.Generator, below: int) -> int:
        return int(torch.randint(below, (), generator=generator))


def read_stretch(path: Path, info: VideoInfo, start: int, frames: int) -> Tensor:
    """Frames start .. start + frames - 1 of a video in its own size: [T, H, W, 3] uint8."""
    with FrameReader(path, info, CropConfig()) as reader:
        return torch.from_numpy(np.stack([reader.read(index) for index in range(start, start + frames)]))


def train_vqvae(config: VQVAETrainConfig) -> VQVAE:
    """Train, save, and say how well the videos come back.

    Returns:
        The model, on its device, in evaluation mode.

    Raises:
        ValueError: no usable video, or a loss that is not finite.
        OSError: `out` cannot be written.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    frames, side = config.crop_size
    crops = RandomCrops(config.videos, frames=frames, side=side, batch_size=config.batch_size, seed=config.seed)
    for reason in crops.skipped:
        console.print(f"skipped {reason}")
    config.out.mkdir(parents=True, exist_ok=True)
    device = config.torch_device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # The quantiser draws from the global generator: first codes, and new ones for those that nothing is near.
        torch.manual_seed(config.seed)
        model = VQVAE(config.model).to(device)
        _train(model, config, crops, console)
    model.eval().requires_grad_(False)
    save_vqvae(model, config.out)
    _say_quality(model, crops.videos, console)
    return model


def _say_quality(model: VQVAE, videos: list[tuple[Path, VideoInfo]], console: Console) -> None:
    """How well the first stretch of some videos comes back, and over how much that is: seconds on any machine."""
    time, space = model.time_factor, model.space_factor
    for path, info in videos[:_CHECKED_VIDEOS]:
        frames = min(info.num_frames, _CHECKED_FRAMES) // time * time
        try:
            pixels = read_stretch(path, info, 0, frames)
        except VideoError as error:
            console.print(f"not measured: {error}")
            continue
        height, width = (min(size, _CHECKED_SIDE) // space * space for size in pixels.shape[1:3])
        top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
        video = to_float(pixels[:, top : top + height, left : left + width])[None].to(model.latent_mean.device)
        console.print(
            f"{path.name}: {psnr(model.decode(model.encode(video)), video):.1f} dB over the middle {width}x{height} "
            f"pixels of its first {frames} of {info.num_frames} frames"
        )
    if len(videos) > _CHECKED_VIDEOS:
        console.print(f"{len(videos) - _CHECKED_VIDEOS} more videos were not measured")


def _train(model: VQVAE, config: VQVAETrainConfig, crops: RandomCrops, console: Console) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps, config.learning_rate / 10)
    latest: deque[Tensor] = deque(maxlen=_LATEST)
    columns = TextColumn("VQ-VAE"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}")
    with (
        published(config.out / "metrics.jsonl") as metrics,
        metrics.open("w", encoding="utf-8") as lines,
        Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("", total=config.steps, figures="")
        for step, batch in zip(range(1, config.steps + 1), crops, strict=False):
            video = batch.to(next(model.parameters()).device)
            try:
                decoded, commitment, quantised = model(video)
                squared = F.mse_loss(decoded, video)
                loss = squared + F.l1_loss(decoded, video) + commitment
                if not loss.isfinite():
                    raise FloatingPointError("the loss is not finite")
            except FloatingPointError as error:
                raise ValueError(f"{error} at step {step}; use a learning_rate below {config.learning_rate}") from error
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            falling.step()
            latest.append(quantised.detach())
            decibels = 10 * math.log10(4 / max(squared.item(), 1e-12))
            lines.write(json.dumps({"step": step, "loss": loss.item(), "psnr": decibels}) + "\n")
            progress.update(task, advance=1, figures=f"{decibels:.1f} dB")
            if not console.is_terminal and step % max(1, config.steps // 10) == 0:
                console.print(f"step {step}/{config.steps}  loss {loss.item():.4f}  {decibels:.1f} dB")
            if step % config.save_every == 0 or step == config.steps:
                model.fit_latent_scale(torch.cat([vectors.flatten(0, -2) for vectors in latest]))
                save_vqvae(model, config.out)
