"""One run writes a folder at a time: a second one is told whose it is, and one that was killed holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longreel.parallel import trainer
from longreel.parallel.config import ParallelConfig
from longreel.parallel.launch import process_group
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.run_folder import LOCK
from longreel.parallel.trainer import Trainer

HOLD = """
import sys, time
from pathlib import Path
from longreel.data.folder_lock import only_writer

with only_writer(Path(sys.argv[1]), sys.argv[2], "train.py --demo"):
    print("held", flush=True)
    time.sleep(60)
"""


def demo(out: Path, **fields: Any) -> TrainConfig:
    sizes: dict[str, Any] = {"steps": 2, "num_frames": 2, "height": 16, "width": 16, "batch_size": 2}
    return TrainConfig(demo=True, out=out, model=ModelChoice(depth=1, hidden_size=32, num_heads=4), **(sizes | fields))


def train_here(config: TrainConfig) -> str:
    """Runs on every rank; the error, if any."""
    try:
        Trainer(config, torch.device("cpu")).train()
    except ValueError as error:
        return str(error)
    return ""


def test_another_run_is_refused_on_every_rank_until_it_is_dead(tmp_path: Path, run_distributed: Any) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path), LOCK]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    partial = tmp_path / "checkpoints" / ".step-000001.partial"
    partial.mkdir(parents=True)
    config = demo(tmp_path, parallel=ParallelConfig(strategy="ulysses", sp_degree=2))
    refused = f"out: {tmp_path} is being written by process {holder.pid} (train.py --demo); give another --out"
    assert run_distributed(train_here, 2, config) == [refused] * 2
    # Nothing of the other run was touched.
    assert partial.is_dir()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert run_distributed(train_here, 2, config) == ["", ""]
    assert not partial.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_looked_before_another_one_wrote_has_to_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    config = demo(tmp_path)
    with process_group() as device:
        if resume:
            Trainer(config, device).train()
            config = demo(tmp_path, steps=4, resume=True)
        open_source = trainer.open_source

        def slowly(*arguments: Any) -> Any:
            # Another run of the same command trains from its beginning to its end meanwhile.
            monkeypatch.setattr(trainer, "open_source", open_source)
            Trainer(config, device).train()
            return open_source(*arguments)

        monkeypatch.setattr(trainer, "open_source", slowly)
        with pytest.raises(ValueError, match=r"another run has written .* while this one was starting.*step-00000"):
            Trainer(config, device)
        last = f"step-{config.steps:06d}"
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1] == last
        assert not list((tmp_path / "checkpoints").glob("*.damaged"))
        # The folder is free.
        assert train_here(demo(tmp_path, steps=5, resume=True)) == ""


def test_a_folder_is_given_up_after_training_and_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with process_group() as device:
        with monkeypatch.context() as patched:
            patched.setattr("longreel.parallel.trainer.check_same_clips", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                Trainer(demo(tmp_path), device)
        assert train_here(demo(tmp_path)) == ""
        assert train_here(demo(tmp_path, steps=3, resume=True)) == ""
