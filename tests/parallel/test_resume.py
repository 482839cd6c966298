"""longreel.parallel.resume and what the trainer counts as saved."""

from __future__ import annotations

import io
import json
import math
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from longreel.data.cutting import CutConfig
from longreel.data.demo import make_demo_folder
from longreel.data.prepare_config import PrepareConfig
from longreel.data.prepare_run import prepare
from longreel.models.autoencoders import AutoencoderConfig
from longreel.models.text import TextEncoderConfig
from longreel.models.vqvae import load_vqvae, save_vqvae
from longreel.parallel import checkpoint_writer
from longreel.parallel.checkpoint import checkpoints, read_description
from longreel.parallel.checkpoint_files import write_description
from longreel.parallel.config_json import to_json
from longreel.parallel.fixed_size_source import FixedSizeClips
from longreel.parallel.launch import process_group
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.optimizer_config import OptimizerConfig
from longreel.parallel.resume import check_same_run
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.sample import Sampler
from longreel.parallel.sample_config import SampleConfig
from longreel.parallel.trainer import Trainer, sample_command, train


def demo(out: Path, *, optimizer: dict[str, Any] | None = None, **fields: Any) -> TrainConfig:
    return TrainConfig(
        demo=True,
        out=out,
        model=ModelChoice(depth=1, hidden_size=32, num_heads=4),
        optimizer=OptimizerConfig(**(optimizer or {})),
        **({"steps": 4, "checkpoint_every": 2, "num_frames": 2, "height": 16, "width": 16} | fields),
    )


@pytest.fixture
def second_step_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = checkpoint_writer.file_digests

    def full_disk(folder: Path, names: list[str]) -> dict[str, str]:
        if "000002" in folder.name:
            raise OSError(28, "No space left on device")
        return digests(folder, names)

    monkeypatch.setattr(checkpoint_writer, "file_digests", full_disk)


@pytest.mark.usefixtures("second_step_is_not_saved")
@pytest.mark.parametrize("background", [False, True])
def test_the_final_state_is_saved_after_a_save_that_failed(tmp_path: Path, background: bool) -> None:
    with process_group() as device:
        saved = Trainer(demo(tmp_path, background_save=background), device).train()
    assert checkpoints(tmp_path / "checkpoints") == [saved]
    assert saved.name == "step-000004"
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    # Since the checkpoint before, which is none.
    assert read_description(saved)["score"] == pytest.approx(math.fsum(losses) / 4, rel=1e-6)


@pytest.mark.usefixtures("second_step_is_not_saved")
def test_what_failed_does_not_count_as_saved(tmp_path: Path) -> None:
    with process_group() as device:
        trainer = Trainer(demo(tmp_path, checkpoint_every=1), device)
        loss_of = trainer.model.loss
        trainer.model.loss = lambda batch: loss_of(batch) * (float("nan") if trainer.step == 2 else 1)  # type: ignore
        with pytest.raises(ValueError, match="not finite at step 3; what was saved up to step 1 stays"):
            trainer.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_old_checkpoints_that_cannot_be_removed_cost_no_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, denied = shutil.rmtree, list[Path]()

    def rmtree(path: Path, **options: Any) -> None:
        if path.name.endswith(".pruned") and len(denied) < 1:
            denied.append(path)
            raise OSError(39, "Directory not empty")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    told = io.StringIO()
    with process_group() as device:
        config = demo(tmp_path, checkpoint_every=1, keep=1, keep_best=False)
        trainer = Trainer(config, device, console=Console(file=told, width=1000))
        trainer.train()
    assert denied == [tmp_path / "checkpoints" / ".step-000001.pruned"]
    assert told.getvalue().count("warning: ") == 1
    assert "old checkpoints cannot be removed: [Errno 39] Directory not empty; training goes on" in told.getvalue()
    # The next save tried again.
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]


@pytest.mark.parametrize(
    "caption", ["two\nlines", "\x1b[2J", "x" * 1_000_000, "\ud800"], ids=["lines", "escape", "long", "half"]
)
def test_a_caption_that_is_no_line_is_left_out_of_the_command(caption: str) -> None:
    assert shlex.split(sample_command(Path("out"), caption))[-1] == "..."
    assert shlex.split(sample_command(Path("out"), 'é "b"'))[-1] == 'é "b"'


def test_a_run_reads_no_clip_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    read = list[int]()
    getitem = FixedSizeClips.__getitem__

    def counted(clips: FixedSizeClips, index: int) -> Any:
        read.append(index)
        return getitem(clips, index)

    monkeypatch.setattr(FixedSizeClips, "__getitem__", counted)
    out = tmp_path / "it's here"
    with process_group() as device:
        train(demo(out, steps=2, batch_size=3), device)
    assert len(read) == 6
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("sample it: ")]
    words = shlex.split(line.removeprefix("sample it: "))
    assert words == [
        "python",
        "parallel/sample.py",
        "--checkpoint",
        str(out),
        "--prompt",
        "a red square moves to the right",
    ]


def test_a_resumed_run_says_how_long_it_took_to_begin(tmp_path: Path) -> None:
    told = io.StringIO()
    with process_group() as device:
        Trainer(demo(tmp_path), device).train()
        Trainer(demo(tmp_path, steps=6, resume=True), device, console=Console(file=told, width=1000)).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "first_step_after" in line] == [1, 5]
    assert lines[4]["first_step_after"] > lines[4]["seconds"]
    assert f"first step {lines[4]['first_step_after']:.1f} s after the process began" in told.getvalue()


def test_other_weights_of_the_autoencoder_are_refused_on_resume_and_said_in_sampling(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    place, told = tmp_path / "vqvae", io.StringIO()
    shutil.copytree(tiny_model("vqvae"), place)
    compression = AutoencoderConfig(autoencoder="vqvae", autoencoder_path=str(place))
    config = demo(tmp_path / "run", steps=1, compression=compression)
    asked = SampleConfig(checkpoint=config.out, prompt=("x",), steps=1)
    with process_group() as device:
        Trainer(config, device).train()
        Sampler(asked, device, console=Console(file=told, width=1000))
        assert "warning" not in told.getvalue()
        model = load_vqvae(place)
        with torch.no_grad():
            model.patch_in.bias += 1
        save_vqvae(model, place)
        with pytest.raises(ValueError, match=r"cannot resume with other weights of the autoencoder: .*\(digests\)"):
            Trainer(replace(config, steps=2, resume=True), device)
        Sampler(asked, device, console=Console(file=told, width=1000))
        assert "warning: the autoencoder has other weights than in training" in told.getvalue()


def resume(before: TrainConfig, now: TrainConfig) -> None:
    before.out.mkdir(exist_ok=True)
    write_description(before.out, {"version": 2, "step": 4, "score": None, "config": to_json(before), "files": {}})
    check_same_run(now, before.out)


def test_an_extended_cosine_names_the_option_that_keeps_it(tmp_path: Path) -> None:
    before = demo(tmp_path, optimizer={"schedule": "cosine", "warmup_steps": 2})
    longer = replace(before, steps=8)
    with pytest.raises(ValueError, match=r"is step 4, the command line's 8; give --decay-steps 4$"):
        resume(before, longer)
    resume(before, replace(longer, optimizer=replace(longer.optimizer, decay_steps=4)))


def test_a_cosine_that_ends_with_warm_up_has_one_end(tmp_path: Path) -> None:
    """Whose steps no decay_steps can say, and need not."""
    before = demo(tmp_path, optimizer={"schedule": "cosine", "warmup_steps": 20})
    resume(before, replace(before, steps=8))
    longer = replace(before, steps=30)
    with pytest.raises(ValueError, match=r"give --decay-steps 21$"):
        resume(before, longer)
    resume(before, replace(longer, optimizer=replace(longer.optimizer, decay_steps=21)))


def test_a_run_on_shards_of_another_text_encoder_goes_on(tmp_path: Path) -> None:
    """Which the command line does not name: shards and checkpoint do."""
    make_demo_folder(tmp_path / "videos", num_frames=4, size=16)
    prepare(
        PrepareConfig(
            videos=tmp_path / "videos",
            captions=tmp_path / "videos" / "captions.json",
            out=tmp_path / "shards",
            processes=1,
            cut=CutConfig(clip_frames=2, min_frames=2),
            text=TextEncoderConfig(text_dim=8, max_text_tokens=6),
        )
    )
    config = TrainConfig(
        shards=tmp_path / "shards",
        out=tmp_path / "run",
        steps=1,
        batch_size=1,
        token_budget=256,
        model=ModelChoice(depth=1, hidden_size=32, num_heads=4),
    )
    with process_group() as device:
        Trainer(config, device).train()
        saved = Trainer(replace(config, steps=2, resume=True), device).train()
    assert saved.name == "step-000002"
