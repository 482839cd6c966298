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
from longreel.data.shards import ShardDataset
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


def prepared(
    videos: Path, out: Path, compression: AutoencoderConfig, patch: tuple[int, int, int], *, stride: int = 1
) -> Path:
    """Shards of a folder of videos, made once for all conditionings and strategies that train on them."""
    if not (out / "index.parquet").is_file():
        prepare(
            PrepareConfig(
                videos=videos,
                captions=videos / "captions.json",
                out=out,
                processes=1,
                patch_size=patch,
                cut=CutConfig(clip_frames=4, min_frames=2, frame_stride=stride),
                compression=compression,
                text=TEXT,
            )
        )
    return out


def check_pipeline(
    run_distributed: Any,
    shards: Path,
    folder: Path,
    conditioning: Any,
    strategy: Any,
    *,
    size: dict[str, int] | None = None,
) -> None:
    """Train on shards, sample from the checkpoint (clips of a size, or that of training), read the mp4 back."""
    parallel = ParallelConfig(strategy=strategy, sp_degree=2)
    clips = ShardDataset(shards)
    config = TrainConfig(
        shards=shards,
        out=folder / "run",
        steps=2,
        batch_size=2,
        # So that some groups are one clip and some are several of different sizes.
        token_budget=max(clips.tokens) * 5 // 4,
        model=ModelChoice(
            depth=1,
            hidden_size=32,
            num_heads=4,
            conditioning=conditioning,
            patch_size=tuple(clips.info["patch_size"]),
        ),
        parallel=parallel,
    )
    asked = SampleConfig(
        checkpoint=folder / "run",
        prompt=("a red square",),
        steps=2,
        out=folder / "clip.mp4",
        parallel=parallel,
        **(size or {}),
    )
    losses = run_distributed(train_and_sample, 2, config, asked)[0]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    run = json.loads((folder / "run" / "checkpoints" / "step-000002" / "run.json").read_text())
    size = run["config"]["clip_size"] | (size or {})
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
    shards = prepared(drawn, tmp_path / "shards", compression_of("vqvae", tiny_model), (1, 2, 2))
    check_pipeline(run_distributed, shards, tmp_path, "in_context", "fastseq")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shards of the grid lie, by source and compression."""
    return tmp_path_factory.mktemp("shards")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ulysses", "fastseq"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("source", ["drawn", "videos"])
def test_every_compression_conditioning_and_strategy(
    drawn: Path,
    shards: Path,
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
    if source == "drawn":
        made = prepared(drawn, shards / f"drawn-{name}", compression_of(name, tiny_model), (1, 2, 2))
        check_pipeline(run_distributed, made, tmp_path, conditioning, strategy)
        return
    # The sample videos are large: patches are, too, and some frames do, so that no part takes minutes.
    patch = (2, 16, 16) if name == "raw" else (1, 8, 8)
    made = prepared(SAMPLE_VIDEOS, shards / f"videos-{name}", compression_of(name, tiny_model), patch, stride=4)
    assert len({clip.source for clip in ShardDataset(made)}) == 3
    check_pipeline(run_distributed, made, tmp_path, conditioning, strategy, size={"height": 128, "width": 192})
