"""longreel.parallel.trainer: the loss curve is the same on any ranks, falls, and survives an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from longreel.data.demo import make_demo_folder
from longreel.models.text import TextEncoderConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.launch import process_group
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.optimizer_config import OptimizerConfig
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.trainer import Trainer

# 3 x 5 x 5 = 75 video tokens: no multiple of 2 or 4.
SIZE = {"num_frames": 6, "height": 20, "width": 20}
TEXT = TextEncoderConfig(text_dim=16, max_text_tokens=10)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    make_demo_folder(folder, num_frames=12, size=24)
    return folder


def tiny(videos: Path, out: Path, *, conditioning: str = "cross", **overrides: Any) -> TrainConfig:
    model = ModelChoice(depth=2, hidden_size=32, num_heads=4, conditioning=conditioning)
    fields = {"steps": 6, "batch_size": 3, "optimizer": OptimizerConfig(warmup_steps=0), "caption_dropout": 0.3} | SIZE
    return TrainConfig(videos=videos, out=out, model=model, text=TEXT, **(fields | overrides))


def train_here(config: TrainConfig) -> None:
    """Runs on every rank."""
    Trainer(config, torch.device("cpu")).train()


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in metrics(out)], dtype=torch.float64)


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert len(a) == len(b) > 0
    return float(((a - b).abs() / b.abs()).max())


CASES = [
    ("local", 1, 2, "fsdp2-zero2", "cross"),
    ("ulysses", 2, 2, "ddp", "adaln"),
    ("ulysses", 2, 4, "fsdp2-zero3", "in_context"),
    ("ulysses", 4, 4, "fsdp2-zero2", "cross"),
    ("fastseq", 2, 2, "fsdp2-zero2", "in_context"),
    ("fastseq", 2, 4, "fsdp2-zero2", "adaln"),
    ("fastseq", 4, 4, "ddp", "cross"),
]


@pytest.mark.parametrize(
    ("strategy", "sp_degree", "world_size", "engine", "conditioning"),
    CASES,
    ids=[f"{s}-P{p}-ranks{w}-{e}-{c}" for s, p, w, e, c in CASES],
)
def test_loss_curve_is_that_of_one_rank_in_fp64(
    videos: Path,
    tmp_path: Path,
    run_distributed: Any,
    strategy: Any,
    sp_degree: int,
    world_size: int,
    engine: Any,
    conditioning: str,
) -> None:
    # Three samples over two groups: the ranks of one hold two, those of the other one.
    base = tiny(videos, tmp_path / "one", conditioning=conditioning, parallel=ParallelConfig(precision="fp64"))
    parallel = ParallelConfig(strategy=strategy, sp_degree=sp_degree, engine=engine, precision="fp64")
    with process_group():
        train_here(base)
    run_distributed(train_here, world_size, replace(base, out=tmp_path / "many", parallel=parallel))
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert largest_difference(many, one) < 1e-10
    assert len(set(one.tolist())) == len(one)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("strategy", ["ulysses", "fastseq"])
def test_200_steps_on_real_videos(tmp_path: Path, run_distributed: Any, strategy: Any) -> None:
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not (folder / "captions.json").is_file():
        pytest.skip(f"the sample videos are not at {folder}")
    base = TrainConfig(videos=folder, steps=200, out=tmp_path / "P1", parallel=ParallelConfig(precision="fp64"))
    with process_group():
        train_here(base)
    one = losses(base.out)
    assert one[-20:].mean() < one[:5].mean() / 2
    for sp_degree in (2, 4):
        parallel = ParallelConfig(strategy=strategy, sp_degree=sp_degree, precision="fp64")
        out = tmp_path / f"P{sp_degree}"
        run_distributed(train_here, sp_degree, replace(base, out=out, parallel=parallel), timeout=700)
        assert largest_difference(losses(out), one) < 1e-6


def test_loss_falls_by_half(videos: Path, tmp_path: Path) -> None:
    config = tiny(videos, tmp_path, steps=150, batch_size=4, num_frames=2, height=8, width=8)
    config = replace(config, optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=0))
    model = ModelChoice(depth=2, hidden_size=64, num_heads=4, patch_size=(1, 4, 4), conditioning="adaln")
    with process_group():
        train_here(replace(config, model=model, checkpoint_every=1000))
    curve = losses(tmp_path)
    assert curve[-15:].mean() < curve[:5].mean() / 2


def test_metrics_have_what_the_progress_bar_shows(videos: Path, tmp_path: Path) -> None:
    with process_group():
        train_here(tiny(videos, tmp_path, steps=5, log_every=2))
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert lines[0].pop("first_step_after") > 0
    for line in lines:
        assert set(line) == {"step", "loss", "grad_norm", "learning_rate", "tokens_per_s", "memory", "seconds"}
        assert line["tokens_per_s"] == pytest.approx(3 * 75 / line["seconds"])
        assert line["memory"] > 1 << 20


def train_sending_all_to_the_host(config: TrainConfig) -> None:
    trainer = Trainer(config, torch.device("cpu"))
    trainer.model.store.min_bytes = 1
    trainer.train()


def test_offload_reports_host_memory_per_rank_and_node(videos: Path, tmp_path: Path, run_distributed: Any) -> None:
    parallel = ParallelConfig(strategy="ulysses", sp_degree=2, policy="offload", attention_provider="torch")
    run_distributed(train_sending_all_to_the_host, 2, tiny(videos, tmp_path, steps=2, parallel=parallel))
    for line in metrics(tmp_path):
        assert line["host_memory"] > 1000
        # Ranks started without a launcher are one node.
        assert line["host_memory"] < line["host_memory_of_node"] <= 2 * line["host_memory"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_equals_the_uninterrupted_one_exactly(videos: Path, tmp_path: Path, precision: Any) -> None:
    config = tiny(videos, tmp_path / "whole", parallel=ParallelConfig(precision=precision))
    config = replace(config, optimizer=OptimizerConfig(warmup_steps=4, clip_norm=0.5, ema_decay=0.9))
    parts = replace(config, out=tmp_path / "parts", steps=4, checkpoint_every=2)
    states = []
    with process_group() as device:
        Trainer(config, device).train()
        Trainer(parts, device).train()
        # As after a crash: two steps past the checkpoint that is left, and half a line.
        newest = parts.out / "checkpoints" / "step-000004"
        newest.rename(newest.with_name(".step-000004.partial"))
        with (parts.out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')
        resumed = Trainer(replace(parts, steps=6, resume=True), device)
        assert resumed.step == 2
        resumed.train()
        whole = Trainer(replace(config, resume=True), device)
        states = [get_model_state_dict(trainer.model.module) for trainer in (whole, resumed)]
        for name, value in states[0].items():
            assert torch.equal(value.full_tensor(), states[1][name].full_tensor()), name
    assert [line["step"] for line in metrics(parts.out)] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(losses(parts.out), losses(config.out))


def test_resume_on_other_ranks(videos: Path, tmp_path: Path, run_distributed: Any) -> None:
    config = tiny(videos, tmp_path / "whole", parallel=ParallelConfig(precision="fp64"))
    parts = replace(config, out=tmp_path / "parts", steps=3)
    with process_group():
        train_here(config)
        train_here(parts)
    parallel = ParallelConfig(strategy="fastseq", sp_degree=2, engine="fsdp2-zero3", precision="fp64", policy="full")
    run_distributed(train_here, 2, replace(parts, steps=6, resume=True, parallel=parallel))
    assert largest_difference(losses(parts.out), losses(config.out)) < 1e-10


def test_older_checkpoints_are_removed(videos: Path, tmp_path: Path) -> None:
    with process_group():
        train_here(tiny(videos, tmp_path, steps=5, checkpoint_every=1, keep=2))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


def test_loss_that_is_not_finite_ends_the_run(videos: Path, tmp_path: Path) -> None:
    with process_group() as device:
        trainer = Trainer(tiny(videos, tmp_path), device)
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(float("nan"))
        with pytest.raises(ValueError, match=r"the loss is not finite at step 1; .* use a learning_rate below"):
            trainer.train()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_a_diverged_run_keeps_the_checkpoint_it_has(videos: Path, tmp_path: Path, what: str) -> None:
    config = tiny(videos, tmp_path, steps=6, log_every=100, checkpoint_every=2, keep=1)
    with process_group() as device:
        trainer = Trainer(config, device)
        loss_of = trainer.model.loss

        def diverge(batch: Any) -> torch.Tensor:
            loss = loss_of(batch)
            # Step 3 of a run that logs nothing; the loss is fine again when step 4 saves.
            if trainer.step == 2 and what == "loss":
                return loss + float("inf")
            if trainer.step == 3 and what == "gradients":
                loss.register_hook(lambda grad: grad * float("nan"))
            return loss

        trainer.model.loss = diverge  # type: ignore[method-assign]
        found = {"loss": "the loss is not finite at step 3", "gradients": "the gradient norm is not finite at step 4"}
        saved = "what was saved up to step 2 stays; use a learning_rate below"
        with pytest.raises(ValueError, match=f"{found[what]}; {saved}"):
            trainer.train()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_text_only_trains_on_sharded_text(videos: Path, tmp_path: Path, run_distributed: Any) -> None:
    parallel = ParallelConfig(strategy="ulysses", sp_degree=2, precision="fp64")
    base = tiny(videos, tmp_path / "one", steps=2, parallel=ParallelConfig(precision="fp64"))
    base = replace(base, model=replace(base.model, text_only=True, cross_layout="published"))
    assert base.model.build().text_only
    assert base.model.build().cross_layout == "published"
    with process_group():
        train_here(base)
    run_distributed(train_here, 2, replace(base, out=tmp_path / "two", parallel=parallel))
    assert largest_difference(losses(tmp_path / "two"), losses(tmp_path / "one")) < 1e-10
