"""Which rows of a sequence a rank holds: of one sample's text and video, or of many clips packed one after the other.

A sequence is [text | video | padding], or [text 0 | video 0 | text 1 | video 1 | ... | padding]; there is text in it
only for in-context conditioning. Each rank holds one of `degree` equal parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from longreel.models.sequence import Packing, SequenceLengths


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRows:
    """Rows of one clip that a rank holds.

    Args:
        text: (start, stop) among the clip's text tokens in the sequence.
        video: (start, stop) among its video tokens; padding counts on beyond their number.
        num_video: video tokens among them that exist.
    """

    text: tuple[int, int]
    video: tuple[int, int]
    num_video: int

    @property
    def num_rows(self) -> int:
        """Rows of the sequence, padding included."""
        return self.text[1] - self.text[0] + self.video[1] - self.video[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of a sequence that one rank holds.

    Args:
        lengths: of the whole sequence.
        clips: what this rank holds of each clip in the sequence, possibly nothing; padding is the last clip's.
    """

    lengths: SequenceLengths
    clips: tuple[ClipRows, ...]


def split_rows(*, num_text: int, num_video: Sequence[int], degree: int, rank: int) -> Rows:
    """The rows of `rank` out of `degree` equal parts of a sequence.

    Args:
        num_text: text tokens in front of each clip's video, 0 unless conditioning is in-context.
        num_video: video tokens of each clip; one clip for a sequence that is not packed.
    """
    ends = tuple(accumulate((num_text + video for video in num_video), initial=0))
    valid = ends[-1]
    size = -(-valid // degree)
    lengths = SequenceLengths(valid=valid, padded=size * degree, cu_seqlens=ends if len(num_video) > 1 else None)
    # The last clip takes the padding.
    bounds = pairwise((*ends[:-1], lengths.padded))
    first, last = rank * size, (rank + 1) * size
    clips = []
    for (start, stop), video in zip(bounds, num_video, strict=True):
        # Counted from the clip's first row.
        low, high = (min(max(row, start), stop) - start for row in (first, last))
        rows = max(low - num_text, 0), max(high - num_text, 0)
        existing = min(rows[1], video) - min(rows[0], video)
        clips.append(ClipRows(text=(min(low, num_text), min(high, num_text)), video=rows, num_video=existing))
    return Rows(lengths=lengths, clips=tuple(clips))


def take_rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Rows start to stop of x [B, N, ...]; rows beyond N are zeros."""
    taken = x[:, min(start, x.shape[1]) : min(stop, x.shape[1])]
    return F.pad(taken, (0, 0) * (x.dim() - 2) + (0, stop - start - taken.shape[1]))


def packing_of(rows: Rows, *, num_text: int, in_context: bool, device: torch.device) -> Packing:
    """What the model is told of a packed sequence.

    Args:
        num_text: text tokens of each clip, in the sequence (`in_context`) or attended to from it; 0 for none.
    """

    def offsets(counts: Sequence[int]) -> Tensor:
        return torch.tensor(list(accumulate(counts, initial=0)), device=device)

    segments = offsets([clip.num_rows for clip in rows.clips])
    if not in_context:
        text_segments = torch.arange(len(rows.clips) + 1, device=device) * num_text if num_text else None
        return Packing(segments=segments, video_segments=segments, text_segments=text_segments)
    # Rows of the sequence, each clip's text before its video, by their place among all text and then all video rows.
    texts = list(accumulate((clip.text[1] - clip.text[0] for clip in rows.clips), initial=0))
    videos = list(accumulate((clip.video[1] - clip.video[0] for clip in rows.clips), initial=texts[-1]))
    places = [torch.arange(*bounds) for both in zip(pairwise(texts), pairwise(videos), strict=True) for bounds in both]
    order = torch.cat(places)
    return Packing(
        segments=segments,
        video_segments=offsets([clip.video[1] - clip.video[0] for clip in rows.clips]),
        order=order.to(device),
        video_rows=(order >= texts[-1]).nonzero().flatten().to(device),
    )
