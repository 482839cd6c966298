"""parallel/export.py and weights_file.py: weights out of a run and back, the original's .pt in, pickles refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from longreel.data.command_line import run_command
from longreel.data.demo import make_demo_folder
from longreel.models.autoencoders import AutoencoderConfig
from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.models.objective import ObjectiveConfig
from longreel.models.original import export_original
from longreel.models.text import TextEncoderConfig
from longreel.parallel.checkpoint import read_weights
from longreel.parallel.config_json import from_json, to_json
from longreel.parallel.export import ExportConfig, export, from_original
from longreel.parallel.launch import process_group
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.optimizer_config import OptimizerConfig
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.sample import Sampler, sample_video
from longreel.parallel.sample_config import SampleConfig
from longreel.parallel.trainer import Trainer
from longreel.parallel.weights_file import read_pickled_weights, read_weights_file, write_weights


def run(folder: Path, **overrides: Any) -> TrainConfig:
    make_demo_folder(folder / "videos", num_frames=4, size=16)
    fields: dict[str, Any] = {"model": ModelChoice(depth=1, hidden_size=32, num_heads=4)}
    fields |= {"out": folder / "run", "steps": 2, "batch_size": 2, "num_frames": 4, "height": 16, "width": 16}
    return TrainConfig(
        videos=folder / "videos",
        optimizer=OptimizerConfig(ema_decay=0.5, learning_rate=1e-2),
        **(fields | overrides),
    )


def test_weights_leave_a_run_and_come_back(tmp_path: Path) -> None:
    with process_group() as device:
        Trainer(run(tmp_path), device).train()
        checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
        file = tmp_path / "weights" / "ema.safetensors"
        export(ExportConfig(checkpoint=tmp_path / "run", out=file))
        weights, config = read_weights_file(file)
        of_checkpoint = read_weights(checkpoint, "ema")
        assert weights.keys() == of_checkpoint.keys()
        assert all(torch.equal(weights[name], of_checkpoint[name]) for name in weights)
        assert not torch.equal(weights["final.proj.weight"], read_weights(checkpoint, "model")["final.proj.weight"])
        assert config["steps"] == 2
        asked = {"prompt": ("a red square",), "steps": 2}
        from_file = sample_video(SampleConfig(checkpoint=file, **asked), device)  # type: ignore[arg-type]
        assert torch.equal(from_file, sample_video(SampleConfig(checkpoint=checkpoint, **asked), device))  # type: ignore[arg-type]
        by_model = SampleConfig(checkpoint=checkpoint, weights="model", **asked)  # type: ignore[arg-type]
        assert not torch.equal(from_file, sample_video(by_model, device))
        # Back into training: the first step starts from them.
        started = Trainer(run(tmp_path, init=file, seed=9, out=tmp_path / "again"), device)
        for name, parameter in started.model.engine.masters().items():
            assert torch.equal(parameter.full_tensor(), weights[name]), name  # type: ignore[attr-defined]
        other = ModelChoice(depth=2, hidden_size=32, num_heads=4)
        with pytest.raises(ValueError, match=r"ema\.safetensors: weights of another model: blocks\.1\..* is missing"):
            Trainer(run(tmp_path, init=file, model=other, out=tmp_path / "other"), device)
        x0 = ObjectiveConfig(prediction="x0")
        with pytest.raises(ValueError, match=r"trained with prediction velocity, this run has x0; give --prediction"):
            Trainer(run(tmp_path, init=file, objective=x0, out=tmp_path / "other"), device)
        larger = ModelChoice(depth=1, hidden_size=32, num_heads=4, position_gain=4)
        with pytest.raises(ValueError, match=r"trained with position_gain 1\.0, this run has 4; give --position-gain"):
            Trainer(run(tmp_path, init=file, model=larger, out=tmp_path / "other"), device)
        with pytest.raises(ValueError, match=r"init: .*run is a folder; give a \.safetensors file .* --checkpoint "):
            Trainer(run(tmp_path, init=tmp_path / "run", out=tmp_path / "other"), device)
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_export_takes_the_newest_whole_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    with process_group() as device:
        Trainer(run(tmp_path, checkpoint_every=1, keep_best=False), device).train()
    older, newest = (tmp_path / "run" / "checkpoints" / f"step-00000{step}" for step in (1, 2))

    def hurt(checkpoint: Path) -> None:
        part = next(checkpoint.glob("*.distcp"))
        if damage == "missing":
            part.unlink()
        else:
            os.truncate(part, part.stat().st_size // 2)

    hurt(newest)
    file = tmp_path / "weights.safetensors"
    capsys.readouterr()
    export(ExportConfig(checkpoint=tmp_path / "run", out=file))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{newest}/")
    assert ": damaged: " in line
    assert line.endswith("; taking step-000001")
    expected = read_weights(older, "ema")
    assert all(torch.equal(value, expected[name]) for name, value in read_weights_file(file)[0].items())
    file.unlink()
    hurt(older)
    with pytest.raises(ValueError, match=r"step-000002/.*: damaged: "):
        export(ExportConfig(checkpoint=tmp_path / "run", out=file))
    assert not file.exists()


def original(folder: Path) -> tuple[DiT, dict[str, torch.Tensor]]:
    """A tiny model of a released width, and its state in the original's layout."""
    config = DiTConfig(depth=1, hidden_size=384, num_heads=6, learn_sigma=True, num_classes=5, position="2d")
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model, export_original(model.state_dict(), config, grid_size=4)


def test_the_originals_file_becomes_ours(tmp_path: Path) -> None:
    model, state = original(tmp_path)
    path = tmp_path / "DiT.pt"
    torch.save({"ema": state, "model": {}, "args": None}, path)
    weights, run = from_original(read_pickled_weights(path), "an-sd-vae")
    assert from_json(DiTConfig, run, "dit") == model.config
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert run["objective"]["objective"] == "ddpm"
    assert run["guided_channels"] == 3
    assert run["clip_size"] == {"num_frames": 1, "height": 64, "width": 64}
    out = tmp_path / "dit.safetensors"
    export(ExportConfig(original=path, autoencoder_path="an-sd-vae", out=out))
    assert json.dumps(read_weights_file(out)[1], sort_keys=True) == json.dumps(run, sort_keys=True)
    with pytest.raises(ValueError, match=r"not a checkpoint of the original DiT: 'x_embedder\.proj\.weight'"):
        from_original({"a": torch.zeros(1)}, "x")


@pytest.mark.parametrize(("num_frames", "warned"), [(None, False), (4, True)])
def test_video_of_a_model_of_images_is_warned_of(tmp_path: Path, num_frames: int | None, warned: bool) -> None:
    dit = DiTConfig(depth=1, hidden_size=32, num_heads=4, in_channels=3, num_classes=5, position="2d")
    size = {"num_frames": 1, "height": 8, "width": 8}
    parts = {"objective": ObjectiveConfig(), "compression": AutoencoderConfig(), "text": TextEncoderConfig()}
    described = {"dit": to_json(dit), "clip_size": size} | {name: asdict(part) for name, part in parts.items()}
    file, said = tmp_path / "images.safetensors", io.StringIO()
    write_weights(file, DiT(dit).state_dict(), described)
    with process_group() as device:
        config = SampleConfig(checkpoint=file, labels=(1,), num_frames=num_frames)
        Sampler(config, device, console=Console(file=said, soft_wrap=True))
    lines = said.getvalue().splitlines()
    assert len(lines) == warned
    assert all(line.startswith("warning: images.safetensors is a model of single images") for line in lines)


class Harmful:
    """Pickled, a call of os.mkdir."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def cut_off(share: float, **options: bool) -> bytes:
    """The beginning of a file of weights."""
    file = io.BytesIO()
    torch.save({"a": torch.zeros(100, 100)}, file, **options)
    return file.getvalue()[: int(share * file.tell())]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", ""),
        (b"text\n", ""),
        (b"import this\n", ""),
        (b"hello\n", ""),
        (pickle.dumps({"a": 1}, protocol=4), ""),
        (pickle.dumps({"a": 1}, protocol=3), ": Invalid magic number; corrupt file?"),
        (cut_off(0.001), ": PytorchStreamReader failed reading zip archive: failed finding central directory"),
        (cut_off(0.5), ""),
        (cut_off(0.002, _use_new_zipfile_serialization=False), ""),
    ],
    ids=["empty", "text", "import", "hello", "pickle-4", "pickle-3", "zip-head", "zip-half", "legacy"],
)
def test_files_of_no_use_are_one_readable_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, reason: str
) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    words = ["--original", str(path), "--autoencoder-path", "x", "--out", str(tmp_path / "x.safetensors")]
    with warnings.catch_warnings():
        # pytest would keep them from the command's stderr.
        warnings.simplefilter("error")
        assert run_command(export, ExportConfig, words) == 2
    expected = f"error: {path}: damaged or cut off, or no file that torch.save wrote{reason}\n"
    assert capsys.readouterr().err == expected


def test_files_that_are_not_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": Harmful(str(tmp_path / "made"))}, path)
    with pytest.raises(ValueError, match=r"x\.pt: refused: .* \(it asks for posix\.mkdir\)$") as raised:
        read_pickled_weights(path)
    assert "\n" not in str(raised.value)
    path.write_bytes(pickle.dumps(Harmful(str(tmp_path / "made"))))
    with pytest.raises(ValueError, match=r"x\.pt: (refused|damaged)"):
        read_pickled_weights(path)
    assert not (tmp_path / "made").exists()
    for content in (b"", b"PK\x03\x04 and no more", b"text\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.pt: (refused|damaged)"):
            read_pickled_weights(path)
    torch.save({"model": [1, 2]}, path)
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        read_pickled_weights(path)
    file = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="no such file"):
        read_weights_file(file)
    file.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="damaged, or no safetensors file"):
        read_weights_file(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="a safetensors file of something else"):
        read_weights_file(file)
