"""The trainer's features: accumulation, clipping, averages, schedules, fp16, SIGTERM, evidence, TensorBoard."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from longreel.data.demo import make_demo_folder
from longreel.models.objective import ObjectiveConfig
from longreel.models.text import TextEncoderConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.launch import process_group
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.optimizer_config import OptimizerConfig, ema_decay, learning_rate
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.trainer import Trainer


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    make_demo_folder(folder, num_frames=8, size=16)
    return folder


def tiny(videos: Path, out: Path, *, optimizer: dict[str, Any] | None = None, **overrides: Any) -> TrainConfig:
    fields: dict[str, Any] = {"steps": 4, "batch_size": 5, "num_frames": 4, "height": 16, "width": 12}
    fields |= {"parallel": ParallelConfig(precision="fp64"), "caption_dropout": 0.3}
    return TrainConfig(
        videos=videos,
        out=out,
        model=ModelChoice(depth=1, hidden_size=32, num_heads=4, conditioning="in_context"),
        text=TextEncoderConfig(text_dim=8, max_text_tokens=6),
        optimizer=OptimizerConfig(**({"warmup_steps": 0, "learning_rate": 1e-2} | (optimizer or {}))),
        **(fields | overrides),
    )


def train_here(config: TrainConfig) -> list[dict[str, Any]]:
    """Runs on every rank; the lines of metrics.jsonl."""
    Trainer(config, torch.device("cpu")).train()
    return lines(config.out)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=no_json) for line in (out / "metrics.jsonl").read_text().splitlines()]


def no_json(word: str) -> None:
    """Python reads NaN and Infinity, other readers of JSON do not."""
    raise ValueError(f"{word} is no JSON")


def same_curve(one: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float) -> None:
    for name in ("loss", "grad_norm", "learning_rate"):
        a, b = (torch.tensor([line[name] for line in curve], dtype=torch.float64) for curve in (one, other))
        assert len(a) == len(b) > 1
        assert ((a - b).abs() / b.abs()).max() < tolerance, name


@pytest.mark.parametrize("engine", ["fsdp2-zero3", "ddp"])
def test_accumulated_micro_batches_are_one_big_batch(
    videos: Path, tmp_path: Path, run_distributed: Any, engine: Any
) -> None:
    # Five samples on two groups in two parts each: 2 + 1 and 1 + 1.
    clipped = {"clip_norm": 0.1, "weight_decay": 0.1}
    whole = tiny(videos, tmp_path / "whole", optimizer=clipped)
    with process_group():
        one = train_here(whole)
    parallel = ParallelConfig(precision="fp64", engine=engine)
    parts = tiny(videos, tmp_path / "parts", optimizer=clipped | {"accumulation": 2}, parallel=parallel)
    same_curve(run_distributed(train_here, 2, parts)[0], one, 1e-10)
    # Clipping took place.
    assert all(line["grad_norm"] > 0.1 for line in one)


def test_ddpm_trains_the_same_on_any_ranks(videos: Path, tmp_path: Path, run_distributed: Any) -> None:
    ddpm = ObjectiveConfig(objective="ddpm")
    with process_group():
        one = train_here(tiny(videos, tmp_path / "one", objective=ddpm))
    parallel = ParallelConfig(precision="fp64", strategy="ulysses", sp_degree=2)
    many = run_distributed(train_here, 2, tiny(videos, tmp_path / "two", objective=ddpm, parallel=parallel))[0]
    same_curve(many, one, 1e-10)


def test_schedules() -> None:
    cosine = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine", min_learning_rate=0.2)
    rates = [learning_rate(cosine, step, 24) for step in range(30)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.6)
    assert rates[24:] == pytest.approx([0.2] * 6)
    assert learning_rate(replace(cosine, decay_steps=14), 14, 24) == pytest.approx(0.2)
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=1)
    assert [learning_rate(constant, step, 9) for step in range(3)] == [0.5, 1.0, 1.0]
    averaged = OptimizerConfig(ema_decay=0.9)
    assert [ema_decay(averaged, step) for step in (1, 8, 1000)] == pytest.approx([2 / 11, 0.5, 0.9])


def averages(config: TrainConfig) -> bool:
    """Whether the average of a run is what the formula makes of its weights, step by step."""
    trainer = Trainer(config, torch.device("cpu"))
    masters, average = trainer.model.engine.masters, trainer.state.ema
    assert average is not None
    expected = {name: p.detach().clone() for name, p in masters().items()}
    for step in range(1, 4):
        trainer.train_step()
        decay = ema_decay(config.optimizer, step)
        expected = {name: decay * expected[name] + (1 - decay) * p.detach() for name, p in masters().items()}
    trainer.batches.close()
    return all(
        torch.allclose(*((x.full_tensor() if hasattr(x, "full_tensor") else x) for x in (value, expected[name])))
        for name, value in average.state().items()
    )


def test_average_follows_the_weights_on_shards(videos: Path, tmp_path: Path, run_distributed: Any) -> None:
    assert all(run_distributed(averages, 2, tiny(videos, tmp_path, optimizer={"ema_decay": 0.5})))


def overflowing(config: TrainConfig) -> tuple[list[dict[str, Any]], str]:
    """Runs on every rank; on the second one a gradient of step 2 overflows. Metrics, and what is said."""
    said = io.StringIO()
    trainer = Trainer(config, torch.device("cpu"), console=Console(file=said, soft_wrap=True))
    loss_of = trainer.model.loss

    def overflow(batch: Any) -> torch.Tensor:
        loss = loss_of(batch)
        if trainer.step == 1 and torch.distributed.get_rank() == 1:
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    trainer.model.loss = overflow  # type: ignore[method-assign]
    trainer.train()
    return lines(config.out), said.getvalue()


def test_an_overflow_is_skipped_and_logged(videos: Path, tmp_path: Path, run_distributed: Any) -> None:
    fp16 = ParallelConfig(precision="fp16")
    told, said = run_distributed(overflowing, 2, tiny(videos, tmp_path, parallel=fp16))[0]
    first, second, third, fourth = told
    assert [line["skipped_steps"] for line in (first, second, third, fourth)] == [0, 1, 1, 1]
    assert second["grad_norm"] is None
    assert all(line["grad_norm"] > 0 for line in (first, third, fourth))
    assert first["loss_scale"] == 2 * second["loss_scale"] == 2 * fourth["loss_scale"]
    assert "step 2 left out: gradients overflowed; the loss is now scaled by 32768" in said
    assert fourth["loss"] < first["loss"]


def test_overflows_that_no_loss_scale_mends_end_the_run(videos: Path, tmp_path: Path) -> None:
    with process_group():
        config = tiny(videos, tmp_path, parallel=ParallelConfig(precision="fp16"), steps=40)
        trainer = Trainer(config, torch.device("cpu"))
        loss_of = trainer.model.loss

        def overflow(batch: Any) -> torch.Tensor:
            loss = loss_of(batch)
            loss.register_hook(lambda grad: grad * float("nan"))
            return loss

        trainer.model.loss = overflow  # type: ignore[method-assign]
        # From 2^16 to 1 and below in 17 steps.
        with pytest.raises(ValueError, match="the gradient norm is not finite at step 17"):
            trainer.train()
    assert (config.out / "bad-batch-000017.json").is_file()


def terminated(config: TrainConfig) -> int:
    """Runs on every rank; the second one gets SIGTERM in its third step. Steps done."""
    trainer = Trainer(config, torch.device("cpu"))
    advance = trainer.state.advance

    def ask(batches: Any) -> Any:
        if trainer.step == 2 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(batches)

    trainer.state.advance = ask  # type: ignore[method-assign]
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return trainer.step


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_on_all_ranks_and_the_run_goes_on(
    videos: Path, tmp_path: Path, run_distributed: Any, ranks: int
) -> None:
    whole = tiny(videos, tmp_path / "whole", steps=8)
    stopped = replace(whole, out=tmp_path / "stopped")
    undisturbed = run_distributed(train_here, ranks, whole)[0]
    done = run_distributed(terminated, ranks, stopped)
    assert len(set(done)) == 1
    assert 3 <= done[0] <= 5
    assert [p.name for p in (stopped.out / "checkpoints").iterdir()] == [f"step-{done[0]:06d}"]
    resumed = run_distributed(train_here, ranks, replace(stopped, resume=True))[0]
    assert [line["loss"] for line in resumed] == [line["loss"] for line in undisturbed]


def test_batch_of_a_loss_that_is_not_finite_is_described(videos: Path, tmp_path: Path) -> None:
    with process_group() as device:
        trainer = Trainer(tiny(videos, tmp_path, checkpoint_every=2), device)
        loss_of = trainer.model.loss
        trainer.model.loss = lambda batch: loss_of(batch) * (float("nan") if trainer.step == 2 else 1)  # type: ignore
        with pytest.raises(ValueError, match=r"the loss is not finite at step 3; what was saved up to step 2 stays"):
            trainer.train()
    assert [line["loss"] is None for line in lines(tmp_path)] == [False, False, True]
    told = json.loads((tmp_path / "bad-batch-000003.json").read_text())
    assert (told["step"], told["ranks"], len(told["samples"])) == (3, [0], 5)
    for sample in told["samples"]:
        assert (videos / sample["file"]).is_file()
        assert 0 <= sample["timestep"] < 1
    assert len({sample["position"] for sample in told["samples"]}) == 5
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_nothing_of_a_step_depends_on_the_global_generator(videos: Path, tmp_path: Path) -> None:
    """So that no generator's state belongs into a checkpoint."""
    with process_group() as device:
        plain = train_here(tiny(videos, tmp_path / "plain"))
        trainer = Trainer(tiny(videos, tmp_path / "stirred"), device)
        advance = trainer.state.advance

        def stirred(batches: Any) -> Any:
            torch.manual_seed(trainer.step + 77)
            return advance(batches)

        trainer.state.advance = stirred  # type: ignore[method-assign]
        trainer.train()
    assert [line["loss"] for line in lines(tmp_path / "stirred")] == [line["loss"] for line in plain]


def test_tensorboard_holds_the_lines_of_metrics(videos: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with process_group():
        told = train_here(tiny(videos, tmp_path, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in told]
    assert {"grad_norm", "tokens_per_s", "memory"} <= set(events.Tags()["scalars"])
