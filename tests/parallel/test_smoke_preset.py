"""The smoke preset: fp32, bf16 and fp16 converge alike, and its clips are recognisable. `pytest -m slow`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longreel.data.command_line import parse_arguments
from longreel.data.video import read_clip
from longreel.parallel.config import ParallelConfig
from longreel.parallel.launch import process_group
from longreel.parallel.presets import with_preset
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.sample import sample_video
from longreel.parallel.sample_config import SampleConfig
from longreel.parallel.trainer import Trainer

PROMPTS = {
    "red_square_right.mp4": "a red square moves to the right",
    "blue_square_down.mp4": "a blue square moves down",
    "green_circle_left.mp4": "a green circle moves to the left",
    "yellow_circle_up.mp4": "a yellow circle moves up",
}


def smoke(out: Path, *words: str) -> TrainConfig:
    return parse_arguments(TrainConfig, with_preset(["--preset", "smoke", "--out", str(out), *words]))


def losses(config: TrainConfig) -> torch.Tensor:
    with process_group() as device:
        Trainer(config, device).train()
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_precisions_converge_alike(tmp_path: Path) -> None:
    curves = {}
    for precision in ("fp32", "bf16", "fp16"):
        parallel: Any = ParallelConfig(precision=precision)
        curves[precision] = losses(replace(smoke(tmp_path / precision, "--steps", "120"), parallel=parallel))
    ends = {precision: float(curve[-20:].mean()) for precision, curve in curves.items()}
    print(ends)
    assert ends["fp32"] < float(curves["fp32"][:5].mean()) / 3
    for precision in ("bf16", "fp16"):
        assert ends[precision] == pytest.approx(ends["fp32"], rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sampled_clips_are_those_of_their_captions(tmp_path: Path) -> None:
    config = smoke(tmp_path)
    losses(config)
    ranks = {}
    with process_group() as device:
        for file, prompt in PROMPTS.items():
            clip = sample_video(SampleConfig(checkpoint=tmp_path, prompt=(prompt,)), device).clamp(-1, 1)
            size = (config.num_frames, config.height, config.width)
            errors = {
                other: float(
                    (clip - read_clip(tmp_path / "demo" / other, *size, stride=config.frame_stride)).square().mean()
                )
                for other in PROMPTS
            }
            ranks[file] = min(errors, key=lambda name: errors[name])
            psnr = -10 * torch.log10(torch.tensor(errors[file] / 4))
            print(f"{prompt}: PSNR {psnr:.1f} dB")
            assert psnr > 20
    assert ranks == {file: file for file in PROMPTS}
