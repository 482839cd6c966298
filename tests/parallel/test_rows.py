"""longreel.parallel.rows: every row of text and video is held by one rank, and clips keep their places."""

from __future__ import annotations

import pytest
import torch

from longreel.parallel.rows import packing_of, split_rows, take_rows

DEGREES = [1, 2, 4, 8]
# One clip alone, clips of very different lengths, one of a single token, more clips than ranks.
CLIPS = [[13], [64, 1, 7], [1] * 11, [5, 5]]


def tokens(kind: int, counts: list[int]) -> list[torch.Tensor]:
    """Clip i's tokens [1, n, 1], all different: kind, clip and place."""
    return [(kind * 100_000 + i * 1000 + torch.arange(n)).reshape(1, -1, 1) for i, n in enumerate(counts)]


@pytest.mark.parametrize("num_text", [0, 5, 20])
@pytest.mark.parametrize("num_video", CLIPS, ids=str)
@pytest.mark.parametrize("degree", DEGREES)
def test_rows_cover_the_sequence_once_and_in_equal_parts(num_text, num_video, degree):
    parts = [split_rows(num_text=num_text, num_video=num_video, degree=degree, rank=r) for r in range(degree)]
    texts, videos = tokens(1, [num_text] * len(num_video)), tokens(2, num_video)
    for i, (text, video) in enumerate(zip(texts, videos, strict=True)):
        clips = [part.clips[i] for part in parts]
        assert torch.equal(torch.cat([take_rows(text, *clip.text) for clip in clips], dim=1), text)
        padded = torch.cat([take_rows(video, *clip.video) for clip in clips], dim=1)
        assert torch.equal(padded[:, : num_video[i]], video)
        assert not padded[:, num_video[i] :].any()
        assert sum(clip.num_video for clip in clips) == num_video[i]
    assert {sum(clip.num_rows for clip in part.clips) for part in parts} == {parts[0].lengths.padded // degree}
    ends = [0, *torch.tensor([num_text + n for n in num_video]).cumsum(0).tolist()]
    assert parts[0].lengths.offsets == tuple(ends)


@pytest.mark.parametrize("num_text", [0, 5])
@pytest.mark.parametrize("num_video", CLIPS, ids=str)
@pytest.mark.parametrize("degree", DEGREES)
def test_packing_puts_each_clips_text_before_its_video(num_text, num_video, degree):
    texts, videos = tokens(1, [num_text] * len(num_video)), tokens(2, num_video)
    sequence = torch.cat([one for both in zip(texts, videos, strict=True) for one in both], dim=1)
    for rank in range(degree):
        rows = split_rows(num_text=num_text, num_video=num_video, degree=degree, rank=rank)
        packing = packing_of(rows, num_text=num_text, in_context=True, device=torch.device("cpu"))
        text = torch.cat([take_rows(x, *c.text) for x, c in zip(texts, rows.clips, strict=True)], dim=1)
        video = torch.cat([take_rows(x, *c.video) for x, c in zip(videos, rows.clips, strict=True)], dim=1)
        ours = torch.cat([text, video], dim=1).index_select(1, packing.order)
        size = rows.lengths.padded // degree
        assert torch.equal(ours, take_rows(sequence, rank * size, (rank + 1) * size))
        assert torch.equal(ours.index_select(1, packing.video_rows), video)
        # Every existing row is in its own clip's segment.
        clip_of = torch.repeat_interleave(torch.arange(len(num_video)), packing.segments.diff())
        existing = ours.flatten() > 0
        assert torch.equal(clip_of[existing], ours.flatten()[existing] // 1000 % 100)
        assert packing.segments[-1] == size
        assert packing.video_segments[-1] == video.shape[1]


def test_packing_attends_to_each_clips_own_text():
    rows = split_rows(num_text=0, num_video=[3, 4], degree=2, rank=1)
    packing = packing_of(rows, num_text=6, in_context=False, device=torch.device("cpu"))
    assert packing.segments.tolist() == [0, 0, 4]
    assert packing.text_segments.tolist() == [0, 6, 12]
    assert packing.video_segments is packing.segments
