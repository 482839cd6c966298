"""parallel/export.py and weights_file.py: weights out of a run and back, the original's .pt in, pickles refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longreel.data.demo import make_demo_folder
from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.models.objective import ObjectiveConfig
from longreel.models.original import export_original
from longreel.parallel.checkpoint import read_weights
from longreel.parallel.config_json import from_json
from longreel.parallel.export import ExportConfig, export, from_original
from longreel.parallel.launch import process_group
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.optimizer_config import OptimizerConfig
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.sample import sample_video
from longreel.parallel.sample_config import SampleConfig
from longreel.parallel.trainer import Trainer
from longreel.parallel.weights_file import read_pickled_weights, read_weights_file


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
        assert not (tmp_path / "other").exists()


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


class Harmful:
    """Pickled, a call of os.mkdir."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def test_files_that_are_not_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": Harmful(str(tmp_path / "made"))}, path)
    with pytest.raises(ValueError, match=r"x\.pt: refused: weights-only loading does not accept it") as raised:
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
