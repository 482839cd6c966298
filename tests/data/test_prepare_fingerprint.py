"""What a prepared folder may be gone on with: the same weights, wherever they lie and however many frames at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longreel.data.cutting import CutConfig
from longreel.data.demo import make_demo_folder
from longreel.data.prepare_config import PrepareConfig
from longreel.data.prepare_run import prepare
from longreel.models.autoencoders import AutoencoderConfig
from longreel.models.vqvae import load_vqvae, save_vqvae
from longreel.models.weights_digest import weights_digest


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    make_demo_folder(tmp_path / "videos", num_frames=8, size=32)
    return tmp_path / "videos"


def config(videos: Path, out: str, compression: AutoencoderConfig, **options: Any) -> PrepareConfig:
    return PrepareConfig(
        videos=videos,
        captions=videos / "captions.json",
        out=videos.parent / out,
        processes=1,
        cut=CutConfig(clip_frames=4),
        compression=compression,
        **options,
    )


def latents_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


def test_other_weights_at_the_same_place_are_not_mixed_in(videos: Path, tiny_model: Callable[[str], Path]) -> None:
    place = videos.parent / "vqvae"
    shutil.copytree(tiny_model("vqvae"), place)
    compression = AutoencoderConfig(autoencoder="vqvae", autoencoder_path=str(place))
    prepare(config(videos, "out", compression))
    model = load_vqvae(place)
    with torch.no_grad():
        model.patch_in.bias += 1
    save_vqvae(model, place)
    with pytest.raises(ValueError, match="holds another preparation, with other autoencoder_weights; give another"):
        prepare(config(videos, "out", compression))


@pytest.mark.parametrize("kind", ["vqvae", "sd-vae"])
def test_weights_may_move_and_more_frames_go_at_a_time(
    videos: Path, tiny_model: Callable[[str], Path], kind: Any
) -> None:
    one = AutoencoderConfig(autoencoder=kind, autoencoder_path=str(tiny_model(kind)), frame_batch=2)
    shutil.copytree(tiny_model(kind), videos.parent / "moved")
    other = AutoencoderConfig(autoencoder=kind, autoencoder_path=str(videos.parent / "moved"), frame_batch=8)
    prepare(config(videos, "out", one))
    made = latents_of(videos.parent / "out")
    assert len(made) == 4
    (videos.parent / "out" / "parts" / "00001.parquet").unlink()
    prepare(config(videos, "out", other))
    assert latents_of(videos.parent / "out") == made
    prepare(config(videos, "alone", other))
    assert latents_of(videos.parent / "alone") == made


def test_a_digest_tells_every_weight_of_small_tensors_and_changes_of_large_ones() -> None:
    small, large = torch.nn.Linear(8, 8), torch.nn.Linear(3000, 1000)
    for module in (small, large):
        before = weights_digest(module)
        assert weights_digest(module) == before
        assert weights_digest(module, 2.0) != before
    before = weights_digest(small), weights_digest(large)
    with torch.no_grad():
        small.weight[3, 4] += 1e-3
        large.weight *= 1.001
    assert weights_digest(small) != before[0]
    assert weights_digest(large) != before[1]
