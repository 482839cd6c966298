"""Batches built ahead of their step, and agreed on by all ranks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from longreel.data.samples import ClipSource
from longreel.parallel.batches import Batches
from longreel.parallel.broken_clips import BrokenClips, LostClips, UnreadableClips
from longreel.parallel.comm import all_gather, all_gather_objects, group_size
from longreel.parallel.sample_batches import AnyBatch

# More clips than these do not break within one step: a disk went away.
MOST_AT_ONCE = 8


class Prefetched:
    """Batches of which the next step's are built in a thread while this one's are trained.

    Args:
        batches: whose results are the same in any thread and order. steps: of the run: no later ones are built.
    """

    def __init__(self, batches: Batches, steps: int) -> None:
        self._batches, self._steps = batches, steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="longreel-batches")
        self._next: tuple[int, Future[list[AnyBatch]]] | None = None

    def micro_batches(self, step: int) -> list[AnyBatch]:
        """See Batches."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] == step:
            batches = ahead[1].result()
        else:
            batches = self._thread.submit(self._batches.micro_batches, step).result()
        if step + 1 < self._steps:
            self._next = step + 1, self._thread.submit(self._batches.micro_batches, step + 1)
        return batches

    def clips_by_tokens(self, step: int) -> dict[int, int]:
        """See Batches."""
        return self._batches.clips_by_tokens(step)

    def describe(self, step: int) -> list[dict[str, Any]]:
        """See Batches; in the thread, which the clips' cache is used by."""
        return self._thread.submit(self._batches.describe, step).result()

    def close(self) -> None:
        """End the thread; what it is building is dropped."""
        self._next = None
        self._thread.shutdown(wait=True, cancel_futures=True)


class AgreedBatches:
    """Batches that every rank could read: what one of them cannot, all of them replace, in this step and later ones.

    Args:
        batches: built ahead. broken: what they leave out. clips: of the run. group: name of the group of all ranks.
        say: hears what is left out; on the first rank it is written down, too.
    """

    def __init__(
        self,
        batches: Prefetched,
        broken: BrokenClips,
        *,
        clips: ClipSource,
        group: str,
        first: bool,
        say: Callable[[str], None],
    ) -> None:
        self._batches, self._broken, self._clips = batches, broken, clips
        self._group, self._first, self._say = group, first, say

    def micro_batches(self, step: int) -> list[AnyBatch]:
        """See Batches.

        Raises:
            LostClips: on every rank: clips cannot be read that nothing takes the place of.
        """
        found: dict[int, str] = {}
        # Built again, a step takes what was built ahead of it along.
        while True:
            batches, mine = list[AnyBatch](), dict[int, str]()
            try:
                batches = self._batches.micro_batches(step)
            except UnreadableClips as error:
                mine = error.reasons
            new = self._of_all_ranks(mine)
            if not new:
                break
            self._check(found | new)
            self._broken.add(new, step)
            found |= new
        if found:
            self._write()
            for reason in found.values():
                self._say(f"left out from step {step + 1} on: {reason}; another clip takes its place")
        return batches

    def clips_by_tokens(self, step: int) -> dict[int, int]:
        """See Batches."""
        return self._batches.clips_by_tokens(step)

    def describe(self, step: int) -> list[dict[str, Any]]:
        """See Batches."""
        return self._batches.describe(step)

    def close(self) -> None:
        """See Prefetched."""
        self._batches.close()

    def _write(self) -> None:
        if not self._first:
            return
        try:
            self._broken.write()
        except OSError as error:
            self._say(f"warning: {error}; a resumed run will not know which clips were left out")

    def _of_all_ranks(self, mine: dict[int, str]) -> dict[int, str]:
        """{clip: reason} of what any rank cannot read."""
        if group_size(self._group) == 1:
            return mine
        if not int(all_gather(torch.tensor([len(mine)]), self._group).sum()):
            return {}
        together: dict[int, str] = {}
        for part in all_gather_objects(mine, self._group):
            together = part | together
        return dict(sorted(together.items()))

    def _check(self, found: dict[int, str]) -> None:
        """LostClips if these are no files that broke, but a disk that went away, or shards that can be made again."""
        first = next(iter(found.values()))
        if self._clips.video(next(iter(found))) is None:
            raise LostClips(
                f"{first}; remove it if it is there, and run the same data/prepare.py command again, then --resume"
            )
        if len(found) > MOST_AT_ONCE:
            raise LostClips(f"{len(found)} clips of one step cannot be read, the first: {first}; are the videos there?")
