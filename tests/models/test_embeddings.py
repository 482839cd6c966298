"""models/embeddings.py against the original's formulas, written again in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longreel.models import embeddings
from longreel.models.embeddings import axis_widths, position_embedding, timestep_embedding
from longreel.models.patches import grid_coords


def sincos_1d(dim: int, positions: np.ndarray) -> np.ndarray:
    omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angles = np.outer(positions.reshape(-1), omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def original_table(dim: int, height: int, width: int) -> np.ndarray:
    """The original image model's frozen table: np.meshgrid over (w, h), first half from its first output."""
    across, down = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return np.concatenate([sincos_1d(dim // 2, across), sincos_1d(dim // 2, down)], axis=1)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (5, 9), (1, 7)], ids=["16x16", "5x9", "1x7"])
@pytest.mark.parametrize("dim", [48, 1152])
def test_2d_is_the_original_table(dim, height, width):
    coords = grid_coords((1, height, width), 0, height * width)
    ours = position_embedding(coords, dim, "2d", torch.float32).numpy()
    expected = original_table(dim, height, width).astype(np.float32)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=6e-8)


def test_2d_ignores_the_frame():
    coords = grid_coords((3, 2, 2), 0, 12)
    ours = position_embedding(coords, 48, "2d", torch.float64)
    assert torch.equal(ours[:4], ours[8:])


@pytest.mark.parametrize("dim", [8, 48, 384, 1024, 1152])
def test_3d_is_one_sin_cos_code_per_axis(dim):
    grid = (4, 3, 5)
    ours = position_embedding(grid_coords(grid, 0, 60, dtype=torch.float64), dim, "3d", torch.float64).numpy()
    widths = [width for _, width in axis_widths(dim, "3d")]
    assert sum(widths) == dim
    assert all(width % 2 == 0 for width in widths)
    t, h, w = (axis.reshape(-1) for axis in np.meshgrid(*map(np.arange, grid), indexing="ij"))
    expected = np.concatenate([sincos_1d(n, x) for n, x in zip(widths, (t, h, w), strict=True)], axis=1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-14)
    assert len(np.unique(ours.round(9), axis=0)) == 60


def test_blocks_of_rows_join_without_a_seam(monkeypatch):
    coords = grid_coords((3, 3, 3), 0, 27)
    whole = position_embedding(coords, 24, "3d", torch.float32)
    monkeypatch.setattr(embeddings, "ROW_BLOCK", 10)
    assert torch.equal(position_embedding(coords, 24, "3d", torch.float32), whole)


def test_fp32_coordinates_stay_exact_at_a_million_tokens():
    coords = grid_coords((3200, 16, 16), 819_199, 819_200)
    assert coords.tolist() == [[3199.0, 15.0, 15.0]]
    ours = position_embedding(coords, 48, "3d", torch.float32).numpy()
    expected = np.concatenate([sincos_1d(16, np.array([x], dtype=np.float64)) for x in (3199, 15, 15)], axis=1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=6e-8)


def test_timestep_embedding_is_cos_then_sin():
    t = torch.tensor([0.0, 0.5, 999.0], dtype=torch.float64)
    frequencies = np.exp(-np.log(10000) * np.arange(128) / 128)
    angles = t.numpy()[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(timestep_embedding(t).numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(timestep_embedding(t.float()).numpy(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: timestep_embedding(torch.zeros(2), 7), "dim must be even"),
        (lambda: timestep_embedding(torch.zeros(2, dtype=torch.bfloat16)), "float32 or float64"),
        (lambda: position_embedding(torch.zeros(4, 2), 48, "3d", torch.float32), r"\[s, 3\]"),
        (lambda: position_embedding(torch.zeros(4, 3).bfloat16(), 48, "3d", torch.float32), "bfloat16"),
        (lambda: axis_widths(6, "2d"), "hidden_size must be a multiple of 4"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
