"""The smoke preset: fp32, bf16 and fp16 converge alike. `pytest -m slow`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longreel.data.command_line import parse_arguments
from longreel.parallel.config import ParallelConfig
from longreel.parallel.launch import process_group
from longreel.parallel.presets import with_preset
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.trainer import Trainer


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
