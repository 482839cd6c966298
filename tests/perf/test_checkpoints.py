"""What saving a checkpoint costs a step: `pytest --benchmark tests/perf/test_checkpoints.py`.

DiT-S/2, the model of preset `small`, its optimizer and the average of its weights, on one rank and one core. CPU time
of this process, all threads together, so that other programs do not count: held-up is what save() takes from the thread
that trains, and a step while a checkpoint is written has the writing's work in it, which another core may do. A step of
the preset has up to 65,536 tokens, 64 times those of the one timed here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longreel.models.config import preset
from longreel.models.dit import DiT
from longreel.parallel.checkpoint_writer import CheckpointWriter
from longreel.parallel.config import ParallelConfig
from longreel.parallel.launch import process_group
from longreel.parallel.mesh import build_mesh
from longreel.parallel.optimizer_config import OptimizerConfig
from longreel.parallel.parallelize import Batch, ParallelDiT
from longreel.parallel.train_state import TrainState

# Half a gigabyte is written several times over, on whatever disk there is.
pytestmark = [pytest.mark.timeout(1800), pytest.mark.benchmark(timer=time.process_time)]


@pytest.fixture(scope="module")
def state() -> Iterator[TrainState]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with process_group():
        model = DiT(preset("dit-s-2", conditioning="cross"))
        spread = ParallelDiT(model, build_mesh(sp_degree=1), ParallelConfig())
        state = TrainState(spread, OptimizerConfig(ema_decay=0.99), 10)
        state.advance([batch(16)])
        yield state
    torch.set_num_threads(threads)


def batch(side: int) -> Batch:
    """One sample of side x side / 4 tokens."""
    latents = torch.randn(1, 1, side, side, 4)
    text = torch.randn(1, 64, 256)
    return Batch(latents=latents, noise=latents, timestep=torch.tensor([0.5]), text=text, global_samples=1)


def test_step_of_1024_tokens(benchmark, state: TrainState) -> None:
    benchmark.pedantic(state.advance, args=([batch(64)],), rounds=3)


def test_step_of_1024_tokens_while_a_checkpoint_is_written(benchmark, state: TrainState, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, state.model.mesh.flat, keep=1)

    def save() -> None:
        writer.wait()
        writer.save(state.step, state.state(), {})

    benchmark.pedantic(state.advance, args=([batch(64)],), setup=save, rounds=3)
    writer.close()


@pytest.mark.parametrize("background", [True, False], ids=["held-up", "written"])
def test_save(benchmark, state: TrainState, tmp_path: Path, background: bool) -> None:
    writer = CheckpointWriter(tmp_path, state.model.mesh.flat, keep=1, background=background)

    def save() -> None:
        writer.save(state.step, state.state(), {})

    # Each round waits for the write before, outside of the clock.
    benchmark.pedantic(save, setup=writer.wait, rounds=3)
    writer.close()
