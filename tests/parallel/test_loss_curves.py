"""100 steps of training by every strategy under every engine: the loss curve of one rank.

`pytest -m slow -s tests/parallel/test_loss_curves.py` prints the largest relative difference of each.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longreel.data.demo import make_demo_folder
from longreel.models.text import TextEncoderConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.trainer import Trainer

STEPS = 100
ENGINES = ["fsdp2-zero2", "fsdp2-zero3", "ddp", "colossalai"]
# Rounding differs between ranks and grows from step to step; a wrong gradient is off by 1e-2 within a few steps.
# ColossalAI's masters are fp32 in an fp64 run.
TOLERANCE = {"fp64": 1e-6, "fp32": 1e-4, "bf16": 2e-2}
COLOSSALAI_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    make_demo_folder(folder, num_frames=12, size=24)
    return folder


def train_here(config: TrainConfig) -> None:
    """Runs on every rank."""
    if config.parallel.engine == "colossalai":
        import cpu_accelerator

        cpu_accelerator.use()
    Trainer(config, torch.device("cpu")).train()


def curve(run_distributed: Any, world_size: int, config: TrainConfig) -> torch.Tensor:
    run_distributed(train_here, world_size, config, timeout=600)
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


def run(videos: Path, out: Path, parallel: ParallelConfig) -> TrainConfig:
    """75 video tokens and 10 of text, which no degree divides; three samples, of which groups of ranks hold 2 and 1."""
    model = ModelChoice(depth=2, hidden_size=32, num_heads=4, conditioning="in_context")
    sizes = {"num_frames": 6, "height": 20, "width": 20}
    return TrainConfig(
        videos=videos,
        out=out,
        steps=STEPS,
        batch_size=3,
        caption_dropout=0.3,
        checkpoint_every=STEPS,
        model=model,
        text=TextEncoderConfig(text_dim=16, max_text_tokens=10),
        parallel=parallel,
        **sizes,
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_strategy_trains_as_one_rank_does(
    videos: Path, tmp_path: Path, run_distributed: Any, engine: Any, precision: Any
) -> None:
    if engine == "colossalai" and importlib.util.find_spec("colossalai") is None:
        pytest.skip("ColossalAI is not installed: make setup-colossalai")
    if engine == "ddp" and precision == "bf16":
        pytest.skip("ddp has no bf16")
    one = curve(run_distributed, 1, run(videos, tmp_path / "one", ParallelConfig(precision=precision)))
    assert len(one) == STEPS
    assert one[-20:].mean() < one[:5].mean()
    for strategy, degree, ranks in (("ulysses", 4, 4), ("fastseq", 2, 4), ("ring", 4, 4), ("usp", 4, 4)):
        parallel = ParallelConfig(
            strategy=strategy,
            sp_degree=degree,
            ulysses_degree=2 if strategy == "usp" else None,
            engine=engine,
            precision=precision,
        )
        many = curve(run_distributed, ranks, run(videos, tmp_path / strategy, parallel))
        difference = float(((many - one).abs() / one).max())
        first = float(((many - one).abs() / one)[:20].max())
        print(f"\n{precision} {engine} {strategy} P={degree}: {difference:.1e}, first 20 steps {first:.1e}")
        assert difference <= (
            COLOSSALAI_TOLERANCE if engine == "colossalai" and precision == "fp64" else TOLERANCE[precision]
        )
