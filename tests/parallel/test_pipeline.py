"""From videos of several sizes to a sampled clip: prepare, train, sample, decode; all compressions and conditionings.

`pytest -m slow tests/parallel/test_pipeline.py` runs all of them, on drawn clips and on the sample videos.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from longreel.data.cutting import CutConfig
from longreel.data.demo import make_demo_folder
from longreel.data.prepare_config import PrepareConfig
from longreel.data.prepare_run import prepare
from longreel.models.autoencoders import AutoencoderConfig
from longreel.models.text import TextEncoderConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.sample import sample
from longreel.parallel.sample_config import SampleConfig
from longreel.parallel.trainer import Trainer

COMPRESSIONS = ["raw", "vqvae", "sd-vae"]
CONDITIONINGS = ["adaln", "cross", "in_context"]
SAMPLE_VIDEOS = Path(__file__).resolve().parents[2].parent / "shared" / "data"
TEXT = TextEncoderConfig(text_dim=16, max_text_tokens=12)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of three sizes, none of them square, in one folder."""
    folder = tmp_path_factory.mktemp("drawn")
    entries = []
    for size, frames in ((24, 6), (32, 4), (16, 8)):
        make_demo_folder(folder / str(size), num_frames=frames, size=size)
        entries += [
            {"file": f"{size}/{entry['file']}", "captions": entry["captions"]}
            for entry in json.loads((folder / str(size) / "captions.json").read_text())
        ]
    (folder / "captions.json").write_text(json.dumps(entries))
    return folder


def train_and_sample(config: TrainConfig, asked: SampleConfig) -> list[float]:
    """Runs on every rank; the losses."""
    device = torch.device("cpu")
    Trainer(config, device).train()
    sample(asked, device)
    return [json.loads(line)["loss"] for line in (config.out / "metrics.jsonl").read_text().splitlines()]


def check_pipeline(
    run_distributed: Any,
    videos: Path,
    folder: Path,
    compression: AutoencoderConfig,
    conditioning: Any,
    strategy: Any,
    *,
    patch: tuple[int, int, int],
    clip_frames: int,
    budget: int,
) -> None:
    prepare(
        PrepareConfig(
            videos=videos,
            captions=videos / "captions.json",
            out=folder / "shards",
            processes=1,
            patch_size=patch,
            cut=CutConfig(clip_frames=clip_frames, min_frames=2),
            compression=compression,
            text=TEXT,
        )
    )
    parallel = ParallelConfig(strategy=strategy, sp_degree=2)
    config = TrainConfig(
        shards=folder / "shards",
        out=folder / "run",
        steps=2,
        batch_size=2,
        token_budget=budget,
        model=ModelChoice(depth=1, hidden_size=32, num_heads=4, conditioning=conditioning, patch_size=patch),
        parallel=parallel,
    )
    asked = SampleConfig(
        checkpoint=folder / "run", prompt=("a red square",), steps=2, out=folder / "clip.mp4", parallel=parallel
    )
    losses = run_distributed(train_and_sample, 2, config, asked)[0]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    size = json.loads((folder / "run" / "checkpoints" / "step-000002" / "run.json").read_text())["config"]["clip_size"]
    with av.open(str(folder / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (size["width"], size["height"])
        assert sum(1 for _ in container.decode(stream)) == size["num_frames"]
        made_by = json.loads(container.metadata["comment"])
        assert (made_by["prompt"], made_by["seed"], made_by["steps"]) == (["a red square"], 0, 2)


def compression_of(name: Any, tiny_model: Callable[[str], Path]) -> AutoencoderConfig:
    return AutoencoderConfig(autoencoder=name, autoencoder_path=None if name == "raw" else str(tiny_model(name)))


def test_drawn_clips_of_three_sizes(
    drawn: Path, tmp_path: Path, run_distributed: Any, tiny_model: Callable[[str], Path]
) -> None:
    compression = compression_of("vqvae", tiny_model)
    sizes = {"patch": (1, 2, 2), "clip_frames": 4, "budget": 200}
    check_pipeline(run_distributed, drawn, tmp_path, compression, "in_context", "fastseq", **sizes)  # type: ignore


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ulysses", "fastseq"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("source", ["drawn", "videos"])
def test_every_compression_conditioning_and_strategy(
    drawn: Path,
    tmp_path: Path,
    run_distributed: Any,
    tiny_model: Callable[[str], Path],
    source: str,
    name: str,
    conditioning: str,
    strategy: str,
) -> None:
    if source == "videos" and not (SAMPLE_VIDEOS / "captions.json").is_file():
        pytest.skip(f"the sample videos are not at {SAMPLE_VIDEOS}")
    videos = drawn if source == "drawn" else SAMPLE_VIDEOS
    # The sample videos are large: patches are, too, so that a step stays one of seconds.
    large = (2, 16, 16) if name == "raw" else (1, 8, 8)
    check_pipeline(
        run_distributed,
        videos,
        tmp_path,
        compression_of(name, tiny_model),
        conditioning,
        strategy,
        patch=(1, 2, 2) if source == "drawn" else large,
        clip_frames=4,
        budget=800 if source == "drawn" else 8000,
    )
