"""What loading gives against what training eats, on this machine: `python bench/loader.py`.

Trains preset `smoke` for some steps, then makes its batches without training: clips decoded from video files every time
(nothing cached), clips of their own sizes decoded and packed, and the same from prepared shards with every checksum
compared. One thread loads, as in training, where it does so while the device works.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longreel.data.captions import load_captions
from longreel.data.clips import ClipDataset
from longreel.data.command_line import parse_arguments
from longreel.data.cutting import CropConfig, CutConfig
from longreel.data.demo import make_demo_folder
from longreel.data.native_clips import NativeClips
from longreel.data.packing import PackedSchedule
from longreel.data.prepare_config import PrepareConfig
from longreel.data.prepare_run import prepare
from longreel.data.samples import ClipSource
from longreel.data.shards import ShardDataset
from longreel.models.autoencoders import RawPixels
from longreel.models.text import build_text_encoder
from longreel.parallel.batches import Batches, DenseBatches, GroupedBatches
from longreel.parallel.fixed_size_source import FixedSizeClips
from longreel.parallel.launch import run_script
from longreel.parallel.mesh import build_mesh
from longreel.parallel.presets import with_preset
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.sample_batches import Samples
from longreel.parallel.trainer import Trainer

# Steps of training before the clock counts.
_WARMUP = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """Loader throughput against training throughput.

    Args:
        steps: of training that are timed. seconds: of loading, for each way.
        least: exit with an error if loading is less than so many times as fast as training; 0 only tells.
    """

    steps: int = 20
    seconds: float = 3.0
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.seconds > 0 or not self.least >= 0:
            raise ValueError(
                f"steps, seconds and least must be positive, got {self.steps}, {self.seconds}, {self.least}"
            )


def measure(config: LoaderConfig, device: torch.device) -> None:
    """Print training's tokens/s and each loader's; ValueError if one is below config.least times training's."""
    with tempfile.TemporaryDirectory() as folder:
        smoke = parse_arguments(TrainConfig, with_preset(["--preset", "smoke"]))
        smoke = replace(smoke, out=Path(folder, "run"), steps=config.steps + _WARMUP, background_save=False)
        Trainer(smoke, device).train()
        lines = (smoke.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        eaten = statistics.median(json.loads(line)["tokens_per_s"] for line in lines[_WARMUP:])
        print(f"training, preset smoke          {eaten:12,.0f} tokens/s   1.0")
        slowest = float("inf")
        for name, batches in loaders(smoke, Path(folder), device).items():
            given = rate(batches, config.seconds)
            slowest = min(slowest, given / eaten)
            print(f"{name:30}  {given:12,.0f} tokens/s  {given / eaten:4.1f} times")
    if slowest < config.least:
        raise ValueError(
            f"loading gives {slowest:.1f} times what training eats; at least {config.least:g} was asked for"
        )


def loaders(smoke: TrainConfig, folder: Path, device: torch.device) -> dict[str, Batches]:
    """Batches of the smoke preset's clips and model, loaded in each way."""
    videos = folder / "videos"
    files = load_captions(make_demo_folder(videos))
    mesh = build_mesh(sp_degree=1, device_type=device.type)
    encoder = build_text_encoder(smoke.text)
    model = smoke.dit(RawPixels(), encoder)
    frames, height, width = model.patch_size
    cut = CutConfig(clip_frames=smoke.num_frames, frame_stride=smoke.frame_stride)
    prepare(
        PrepareConfig(
            videos=videos,
            captions=videos / "captions.json",
            out=folder / "shards",
            patch_size=model.patch_size,
            cut=cut,
            processes=1,
        )
    )

    def samples(clips: ClipSource) -> Samples:
        return Samples(
            clips=clips,
            encoder=encoder,
            objective=smoke.objective.build(),
            seed=smoke.seed,
            caption_dropout=smoke.caption_dropout,
            mesh=mesh,
            device=device,
        )

    def packed(clips: ClipSource) -> Batches:
        tokens = [t // frames * (h // height) * (w // width) for t, h, w in clips.sizes]
        schedule = PackedSchedule(tokens, budget=smoke.batch_size * max(tokens))
        return GroupedBatches(samples(clips), schedule, packed=True, tokens=tokens)

    size: dict[str, Any] = {"num_frames": smoke.num_frames, "height": smoke.height, "width": smoke.width}
    fixed = FixedSizeClips(
        ClipDataset(videos, files, **size, stride=smoke.frame_stride, cache_bytes=0), RawPixels(), cache_bytes=0
    )
    tokens = (smoke.num_frames // frames) * (smoke.height // height) * (smoke.width // width)
    crop = CropConfig(frames=frames, height=height, width=width)
    return {
        "decoded, one size": DenseBatches(samples(fixed), batch_size=smoke.batch_size, accumulation=1, tokens=tokens),
        "decoded, own sizes, packed": packed(NativeClips(videos, files, cut=cut, crop=crop)),
        "shards, packed": packed(ShardDataset(folder / "shards")),
    }


def rate(batches: Batches, seconds: float) -> float:
    """Video tokens per second."""
    batches.micro_batches(0)
    began, step, tokens = time.perf_counter(), 0, 0
    while time.perf_counter() - began < seconds:
        step += 1
        batches.micro_batches(step)
        tokens += sum(length * clips for length, clips in batches.clips_by_tokens(step).items())
    return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(run_script(measure, LoaderConfig, sys.argv[1:]))
