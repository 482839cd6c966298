"""longreel.parallel.batches: a step is the same however its samples are spread over ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longreel.data.captions import load_captions
from longreel.data.clips import ClipDataset
from longreel.data.demo import make_demo_folder
from longreel.models.autoencoders import RawPixels
from longreel.models.flow import RectifiedFlow
from longreel.models.text import ByteTextEncoder
from longreel.parallel.batches import DenseBatches, check_same_clips, split_samples
from longreel.parallel.fixed_size_source import FixedSizeClips
from longreel.parallel.mesh import build_mesh
from longreel.parallel.sample_batches import Samples, draw_sample

FLOW = RectifiedFlow()


@pytest.mark.parametrize(("num_samples", "dp"), [(4, 1), (4, 4), (7, 2), (7, 3), (9, 4)])
def test_split_covers_every_sample_once_and_evenly(num_samples: int, dp: int) -> None:
    parts = [split_samples(num_samples, dp, rank) for rank in range(dp)]
    assert [sample for part in parts for sample in part] == list(range(num_samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_split_refuses_ranks_without_samples() -> None:
    with pytest.raises(ValueError, match="batch_size 3 is less than the 4 data-parallel groups"):
        split_samples(3, 4, 0)


def draw(seed: int = 0, sample: int = 0, step: int = 0, dropout: float = 0.0) -> tuple[str, Any, Any]:
    return draw_sample(seed, sample, step, num_captions=2, caption_dropout=dropout, size=(2, 3), objective=FLOW)


def test_a_sample_is_its_seed_position_and_step() -> None:
    first, again = draw(1, 2, 3), draw(1, 2, 3)
    assert first.caption == again.caption
    assert torch.equal(first.timestep, again.timestep)
    assert torch.equal(first.noise, again.noise)
    for other in (draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4)):
        assert not torch.equal(first.timestep, other.timestep)
        assert not torch.equal(first.noise, other.noise)


def test_captions_are_drawn_evenly_and_dropped_at_the_rate() -> None:
    counts = Counter(draw(step=step, dropout=0.2).caption for step in range(2000))
    assert counts[None] / 2000 == pytest.approx(0.2, abs=0.04)
    assert counts[0] / 2000 == pytest.approx(0.4, abs=0.05)
    assert draw(dropout=1.0).caption is None


def test_dropout_changes_neither_timestep_nor_noise() -> None:
    kept, dropped = draw(dropout=0.0), draw(dropout=1.0)
    assert torch.equal(kept.timestep, dropped.timestep)
    assert torch.equal(kept.noise, dropped.noise)


def test_batches_of_all_groups_are_the_batch_of_one_rank(tmp_path: Path) -> None:
    captions = make_demo_folder(tmp_path, num_frames=8, size=16)
    clips = ClipDataset(tmp_path, load_captions(captions), num_frames=4, height=8, width=8)
    encoder = ByteTextEncoder(8, 16)

    def micro_batches(dp_degree: int, dp_rank: int, accumulation: int = 1) -> Any:
        mesh: Any = SimpleNamespace(dp_degree=dp_degree, dp_rank=dp_rank)
        device = torch.device("cpu")
        samples = Samples(
            clips=FixedSizeClips(clips, RawPixels()),
            encoder=encoder,
            objective=FLOW,
            seed=3,
            caption_dropout=0.3,
            mesh=mesh,
            device=device,
        )
        return DenseBatches(samples, batch_size=5, accumulation=accumulation, tokens=8).micro_batches(5)

    (whole,) = micro_batches(1, 0)
    assert whole.latents.shape == (5, 4, 8, 8, 3)
    for dp_degree, accumulation in ((2, 1), (3, 1), (1, 3), (2, 2)):
        parts = [part for rank in range(dp_degree) for part in micro_batches(dp_degree, rank, accumulation)]
        assert len(parts) == dp_degree * accumulation
        for name in ("latents", "noise", "timestep", "text"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
        assert {part.global_samples for part in parts} == {5}


def clips_of_rank(folders: list[Path]) -> str:
    mesh = build_mesh(sp_degree=1)
    folder = folders[mesh.dp_rank]
    clips = FixedSizeClips(
        ClipDataset(folder, load_captions(folder / "captions.json"), num_frames=4, height=8, width=8), RawPixels()
    )
    try:
        check_same_clips(clips, mesh)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_see_different_videos_are_refused(tmp_path: Path, run_distributed: Any) -> None:
    whole, partial = tmp_path / "whole", tmp_path / "partial"
    for folder in (whole, partial):
        make_demo_folder(folder, num_frames=8, size=16)
    next(partial.glob("*.mp4")).unlink()
    for message in run_distributed(clips_of_rank, 2, [whole, partial]):
        assert "ranks see different videos (clips per rank: 8, 6)" in message
    assert run_distributed(clips_of_rank, 2, [whole, whole]) == ["", ""]
