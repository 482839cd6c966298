"""What training reads: a clip's latents with its captions, from shards or decoded on the fly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from longreel.data.video import VideoInfo


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Clip:
    """One clip.

    Args:
        latents: [T', H', W', C] fp32, of the autoencoder that made them; pixels in [-1, 1] for `raw`.
        captions: at least one. text: their features [captions, L, text_dim] fp32, or None where captions are encoded
            when they are used.
        fps: frames of the clip per second. source: path of the video in its folder. start: its first frame there.
    """

    latents: Tensor
    captions: tuple[str, ...]
    text: Tensor | None
    fps: float
    source: str
    start: int


class ClipSource(Protocol):
    """A fixed list of clips of any sizes, the same for every process that opens it."""

    def __len__(self) -> int:
        """Number of clips."""
        ...

    def __getitem__(self, index: int) -> Clip:
        """Read one clip; ValueError names the file that cannot be read."""
        ...

    def video(self, index: int) -> tuple[str, VideoInfo] | None:
        """(file, what it holds) of the video that a clip is decoded from; None where clips are stored."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of one clip, without reading it."""
        ...

    @property
    def sizes(self) -> Sequence[tuple[int, int, int]]:
        """(T', H', W') of each clip's latents, known without reading it."""
        ...

    @property
    def channels(self) -> int:
        """C of the latents."""
        ...

    @property
    def digest(self) -> str:
        """14 hex digits that name the clips and captions in their order; not where they lie."""
        ...
