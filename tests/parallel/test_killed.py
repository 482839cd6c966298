"""A rank killed at any moment: the run goes on from its last checkpoint, and its loss curve is the undisturbed one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longreel.data.demo import make_demo_folder
from longreel.models.text import TextEncoderConfig
from longreel.parallel.checkpoint import checkpoints
from longreel.parallel.config import ParallelConfig
from longreel.parallel.metrics_log import METRICS
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.optimizer_config import OptimizerConfig
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.trainer import Trainer
from longreel.parallel.workers import WorkerError

# Other layouts that a killed run goes on with: (ranks, how it is spread, micro-batches of a rank).
OTHERS = [
    (1, ParallelConfig(precision="fp64"), 3),
    (2, ParallelConfig(precision="fp64", engine="ddp"), 1),
    (2, ParallelConfig(precision="fp64", engine="fsdp2-zero3", strategy="fastseq", sp_degree=2), 1),
    (3, ParallelConfig(precision="fp64", engine="fsdp2-zero3"), 1),
    (4, ParallelConfig(precision="fp64", strategy="ulysses", sp_degree=4, policy="full"), 2),
    (4, ParallelConfig(precision="fp64", strategy="ring", sp_degree=2), 1),
]


def run(folder: Path, steps: int) -> TrainConfig:
    make_demo_folder(folder / "videos", num_frames=8, size=16)
    return TrainConfig(
        videos=folder / "videos",
        out=folder / "undisturbed",
        model=ModelChoice(depth=1, hidden_size=32, num_heads=4, conditioning="in_context"),
        text=TextEncoderConfig(text_dim=8, max_text_tokens=6),
        optimizer=OptimizerConfig(warmup_steps=5, schedule="cosine", clip_norm=1.0, ema_decay=0.9),
        parallel=ParallelConfig(precision="fp64", strategy="ulysses", sp_degree=2),
        steps=steps,
        batch_size=3,
        num_frames=4,
        height=16,
        width=12,
        checkpoint_every=7,
    )


def train_here(config: TrainConfig) -> None:
    """Runs on every rank."""
    Trainer(config, torch.device("cpu")).train()


def killed(config: TrainConfig, victim: int, progress: int, delay: float) -> None:
    """Runs on every rank: the victim is killed `delay` seconds after the run has reached a number of steps.

    From a thread: the moment may be anywhere, inside a step, a collective or the writing of a checkpoint.
    """
    trainer = Trainer(config, torch.device("cpu"))

    def kill() -> None:
        while trainer.step < progress:
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    if torch.distributed.get_rank() == victim:
        threading.Thread(target=kill, daemon=True).start()
    trainer.train()
    # The run may have been faster than the thread.
    time.sleep(30)


def curve(out: Path) -> torch.Tensor:
    told = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert [line["step"] for line in told] == list(range(1, len(told) + 1))
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in told], dtype=torch.float64)


def check_kill(run_distributed: Any, base: TrainConfig, whole: torch.Tensor, chance: random.Random, name: str) -> str:
    """Kill one rank of a run at random, go on in the same and in another layout; what happened, for people."""
    out = base.out.with_name(name)
    victim, progress, delay = chance.randrange(2), chance.randrange(1, base.steps), chance.random() * 0.02
    with pytest.raises(WorkerError, match=f"rank {victim} of 2 died with exit code -9"):
        run_distributed(killed, 2, replace(base, out=out), victim, progress, delay)
    left = [path.name for path in checkpoints(out / "checkpoints")]
    ranks, parallel, accumulation = chance.choice(OTHERS)
    elsewhere = replace(
        base,
        out=base.out.with_name(f"{name}-elsewhere"),
        resume=True,
        parallel=parallel,
        optimizer=replace(base.optimizer, accumulation=accumulation),
    )
    shutil.copytree(out, elsewhere.out)
    run_distributed(train_here, 2, replace(base, out=out, resume=True))
    assert torch.equal(curve(out), whole)
    run_distributed(train_here, ranks, elsewhere)
    assert ((curve(elsewhere.out) - whole).abs() / whole.abs()).max() < 1e-6
    when = f"rank {victim}, {delay * 1e3:.0f} ms after step {progress}"
    return f"{when}: left {left}, went on as {parallel.strategy} on {ranks}"


def test_a_rank_killed_at_a_random_moment_costs_nothing(tmp_path: Path, run_distributed: Any) -> None:
    base = run(tmp_path, 20)
    run_distributed(train_here, 2, base)
    seed = time.time_ns() % 2**32
    # Printed where the test fails.
    print(f"seed {seed}")
    print(check_kill(run_distributed, base, curve(base.out), random.Random(seed), "killed"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_20_kills_of_a_run_of_200_steps(tmp_path: Path, run_distributed: Any) -> None:
    base = run(tmp_path, 200)
    run_distributed(train_here, 2, base, timeout=600)
    whole, chance = curve(base.out), random.Random(6)
    for number in range(20):
        print(check_kill(run_distributed, base, whole, chance, f"killed-{number}"), flush=True)
