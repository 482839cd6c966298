"""models/patches.py: element and token order, round trips, coordinates of ranges."""

from __future__ import annotations

import itertools

import pytest
import torch

from longreel.models.patches import grid_coords, patchify, unpatchify


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3), (1, 1, 1)], ids=str)
def test_token_and_element_order(patch):
    grid, channels = (2, 3, 1), 2
    sizes = [n * p for n, p in zip(grid, patch, strict=True)]
    video = torch.arange(2 * sizes[0] * sizes[1] * sizes[2] * channels).reshape(2, *sizes, channels)
    tokens = patchify(video, patch)
    assert tokens.shape == (2, 6, patch[0] * patch[1] * patch[2] * channels)
    for i, (t, h, w) in enumerate(itertools.product(*map(range, grid))):
        for j, (pt, ph, pw, c) in enumerate(itertools.product(*map(range, patch), range(channels))):
            expected = video[1, t * patch[0] + pt, h * patch[1] + ph, w * patch[2] + pw, c]
            assert tokens[1, i, j] == expected
    assert torch.equal(unpatchify(tokens, grid, patch, channels), video)


def test_coordinates_of_a_range_are_rows_of_the_whole():
    grid = (3, 2, 5)
    whole = grid_coords(grid, 0, 30)
    assert whole.tolist() == [list(map(float, row)) for row in itertools.product(*map(range, grid))]
    assert torch.equal(grid_coords(grid, 7, 19), whole[7:19])
    assert grid_coords(grid, 4, 4).shape == (0, 3)


def test_padding_rows_count_on_into_frames_that_do_not_exist():
    assert grid_coords((1, 2, 2), 3, 6, dtype=torch.float64).tolist() == [[0, 1, 1], [1, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patchify(torch.zeros(1, 3, 4, 4), (1, 2, 2)), r"\[B, T, H, W, C\]"),
        (lambda: patchify(torch.zeros(1, 3, 4, 5, 1), (1, 2, 2)), "W = 5"),
        (lambda: unpatchify(torch.zeros(1, 5, 4), (1, 2, 2), (1, 2, 2), 1), "tokens"),
        (lambda: grid_coords((1, 2, 2), 3, 2), "start <= stop"),
        (lambda: grid_coords((1, 0, 2), 0, 2), "grid"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
