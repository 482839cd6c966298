"""Real sample videos where they lie beside the checkout, and videos encoded for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks here are tiny: a second thread waits more than it works, and on a busy machine waits long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Near lossless, and quick.
_OPTIONS = {
    "libx264": {"crf": "1"},
    "libx265": {"crf": "4", "preset": "ultrafast", "x265-params": "log-level=none:pools=1"},
    "libsvtav1": {"crf": "8", "preset": "12", "svtav1-params": "lp=1"},
    "mpeg2video": {"q": "2"},
    "libvpx-vp9": {"crf": "4", "b": "0", "deadline": "realtime", "cpu-used": "8"},
}


@pytest.fixture(scope="session")
def sample_videos() -> Path:
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not (folder / "captions.json").is_file():
        pytest.skip(f"the sample videos are not at {folder}")
    return folder


@pytest.fixture
def encode(tmp_path: Path) -> Callable[..., Path]:
    """encode(name, levels [T, H, W] uint8 luma, ...) -> path; grey pictures, one frame per level plane."""

    def build(
        name: str,
        levels: np.ndarray,
        *,
        format: str | None = None,
        full_range: bool = False,
        pixel_aspect: str | None = None,
        times: list[int] | None = None,
        codec: str = "libx264",
        **options: str,
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w", format=format) as container:
            stream = container.add_stream(codec, rate=25, options=_OPTIONS[codec] | options)
            stream.height, stream.width = levels.shape[1:]
            stream.pix_fmt = "yuv420p"
            stream.codec_context.color_range = 2 if full_range else 1
            if pixel_aspect:
                stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
            for index, plane in enumerate(levels):
                height, width = plane.shape
                planes = np.concatenate([plane.reshape(-1), np.full(height * width // 2, 128, np.uint8)])
                frame = av.VideoFrame.from_ndarray(planes.reshape(height * 3 // 2, width), format="yuv420p")
                frame.color_range = 2 if full_range else 1
                if times is not None:
                    frame.pts, frame.time_base = times[index], Fraction(1, 100)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return build
