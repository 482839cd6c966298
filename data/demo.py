"""A folder of small drawn clips with captions, for training where no video is at hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from longreel.data.mp4 import write_mp4
from longreel.models.publish import published

_SCENES = (
    ("red_square_right.mp4", "square", (0.9, -0.7, -0.7), (-0.5, 0.0), (0.5, 0.0), "a red square moves to the right"),
    ("blue_square_down.mp4", "square", (-0.7, -0.4, 0.9), (0.0, -0.5), (0.0, 0.5), "a blue square moves down"),
    ("green_circle_left.mp4", "circle", (-0.7, 0.8, -0.6), (0.5, 0.0), (-0.5, 0.0), "a green circle moves to the left"),
    ("yellow_circle_up.mp4", "circle", (0.9, 0.8, -0.8), (0.0, 0.5), (0.0, -0.5), "a yellow circle moves up"),
)
_BACKGROUND = -0.8

DEMO_FRAMES = 32


def make_demo_folder(folder: Path, *, num_frames: int = DEMO_FRAMES, size: int = 64, fps: float = 16) -> Path:
    """Encode four clips of a moving square or circle and write their captions file.

    Args:
        folder: where the files go; created if needed, files of the same names are replaced.
        num_frames: frames per clip. size: height and width in pixels. fps: frames per second.

    Returns:
        Path of captions.json in that folder.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, shape, color, begin, end, caption in _SCENES:
        write_mp4(folder / name, _moving_shape(shape, color, begin, end, num_frames, size), fps)
        entries.append({"file": name, "captions": [caption]})
    captions = folder / "captions.json"
    with published(captions) as partial:
        partial.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return captions


def _moving_shape(
    shape: str,
    color: tuple[float, float, float],
    begin: tuple[float, float],
    end: tuple[float, float],
    num_frames: int,
    size: int,
) -> Tensor:
    """[T, size, size, 3] in [-1, 1]; positions are (x, y) in [-1, 1], the edge is soft over one pixel."""
    progress = torch.linspace(0, 1, num_frames).view(-1, 1, 1)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    dx = axis.view(1, 1, -1) - (begin[0] + (end[0] - begin[0]) * progress)
    dy = axis.view(1, -1, 1) - (begin[1] + (end[1] - begin[1]) * progress)
    distance = torch.hypot(dx, dy) if shape == "circle" else torch.maximum(dx.abs(), dy.abs())
    # Both shapes cover the same area, so that none is easier to learn than the other.
    radius = 0.4 * (2 / math.sqrt(math.pi) if shape == "circle" else 1.0)
    inside = ((radius - distance) * size / 2 + 0.5).clamp(0, 1).unsqueeze(-1)
    return _BACKGROUND + inside * (torch.tensor(color) - _BACKGROUND)
