"""parallel/sample.py: the video of a prompt and seed is the same on any ranks; prompt, guidance and seed matter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from torch import Tensor

from longreel.data.demo import make_demo_folder
from longreel.data.pictures import read_clip
from longreel.models.text import TextEncoderConfig
from longreel.parallel.checkpoint import read_run
from longreel.parallel.config import ParallelConfig
from longreel.parallel.launch import process_group
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.optimizer_config import OptimizerConfig
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.sample import sample, sample_video
from longreel.parallel.sample_config import SampleConfig
from longreel.parallel.trainer import Trainer
from longreel.parallel.weights_file import write_weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few large steps, so that gates, text and output layer all matter."""
    out = tmp_path_factory.mktemp("run")
    make_demo_folder(out / "videos", num_frames=6, size=24)
    model = ModelChoice(depth=2, hidden_size=32, num_heads=4, conditioning="in_context")
    config = TrainConfig(
        videos=out / "videos",
        out=out / "run",
        model=model,
        steps=15,
        text=TextEncoderConfig(text_dim=16, max_text_tokens=10),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        num_frames=6,
        height=20,
        width=20,
        caption_dropout=0.3,
        parallel=ParallelConfig(precision="fp64"),
    )
    with process_group() as device:
        Trainer(config, device).train()
    return config.out


def configured(trained: Path, **overrides: Any) -> SampleConfig:
    fields = {"checkpoint": trained, "prompt": ("a red square",), "steps": 4, "guidance": 2.0}
    return SampleConfig(**(fields | {"parallel": ParallelConfig(precision="fp64")} | overrides))


def sample_here(config: SampleConfig) -> Tensor:
    """Runs on every rank."""
    return sample_video(config, torch.device("cpu"))


@pytest.fixture(scope="module")
def one_rank(trained: Path) -> Tensor:
    with process_group():
        return sample_here(configured(trained))


@pytest.mark.parametrize(
    ("strategy", "sp_degree", "world_size"),
    [("ulysses", 2, 2), ("fastseq", 4, 4), ("fastseq", 2, 4), ("ring", 2, 2), ("usp", 4, 4)],
    ids=["ulysses-P2", "fastseq-P4", "fastseq-P2-dp2", "ring-P2", "usp-P4"],
)
def test_every_rank_has_the_video_of_one(
    trained: Path, one_rank: Tensor, run_distributed: Any, strategy: Any, sp_degree: int, world_size: int
) -> None:
    hybrid = {"ulysses_degree": 2} if strategy == "usp" else {}
    parallel = ParallelConfig(strategy=strategy, sp_degree=sp_degree, precision="fp64", **hybrid)
    for video in run_distributed(sample_here, world_size, configured(trained, parallel=parallel)):
        torch.testing.assert_close(video, one_rank, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"prompt": ("a blue circle",)}, {"guidance": 1.0}, {"seed": 1}, {"steps": 5}],
    ids=lambda c: next(iter(c)),
)
def test_what_is_asked_for_matters(trained: Path, one_rank: Tensor, change: dict[str, Any]) -> None:
    with process_group():
        video = sample_here(configured(trained, **change))
    assert (video - one_rank).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_size": {"height": None}}, "height: expected a whole number, got None"),
        ({"clip_size": {"num_frames": "six"}}, "num_frames: expected a whole number, got 'six'"),
        ({"dit": None}, "dit: expected an object, got None"),
        ({"dit": {"depth": "two"}}, "dit: not one of this version: "),
        ({"dit": {"rings": 3}}, "dit: not one of this version: .*'rings'"),
    ],
    ids=["no-height", "text", "no-model", "depth", "unknown"],
)
def test_damaged_configuration_names_file_and_field(
    trained: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = read_run(trained / "checkpoints" / "step-000015")[1]
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    path = tmp_path / "weights.safetensors"
    write_weights(path, {}, config)
    out = tmp_path / "new" / "clip.mp4"
    with process_group() as device, pytest.raises(ValueError, match=rf"weights\.safetensors: {message}"):
        sample(configured(path, out=out), device)
    assert not out.parent.exists()


def test_more_guided_channels_than_there_are_is_refused(trained: Path) -> None:
    with (
        process_group() as device,
        pytest.raises(ValueError, match="guided_channels 4 is more than the 3 channels of this model; use 1 to 3"),
    ):
        sample_video(configured(trained, guided_channels=4), device)


def test_guidance_of_one_leaves_the_empty_caption_out(trained: Path) -> None:
    with process_group():
        empty = configured(trained, prompt=("",), guidance=1.0)
        # With the empty prompt both sides of guidance are one, so any scale gives the unguided video.
        torch.testing.assert_close(sample_here(empty), sample_here(replace(empty, guidance=3.0)), rtol=0, atol=1e-6)


def test_mp4_holds_the_sampled_video_at_the_asked_size(trained: Path, tmp_path: Path) -> None:
    config = configured(trained, num_frames=4, height=16, width=24, out=tmp_path / "new" / "clip.mp4", fps=12)
    with process_group() as device:
        sample(config, device)
        video = sample_here(config)
    assert video.shape == (4, 16, 24, 3)
    with av.open(str(config.out)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 12
        assert (stream.width, stream.height) == (24, 16)
    again = read_clip(config.out, 4, 16, 24)
    # Noise in colour does not survive 4:2:0, brightness does.
    luma = torch.tensor([0.2126, 0.7152, 0.0722])
    assert ((again - video.clamp(-1, 1)) @ luma).abs().mean() < 0.1
