"""Which clips of any sizes train together: packed into one token budget, or in buckets of one size.

Both are functions of (clips, budget, seed) alone, never of a rank, and give every clip once per epoch. A group is what
one micro-batch of one data-parallel rank holds; a step takes `groups_per_step` of them, epoch after epoch.
Source of first-fit decreasing: Johnson 1973; it fills bins to 9/11 of the optimum at worst.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from longreel.data.clips import seeded_generator

Group = tuple[int, ...]

# A window's packs that are filled less go on into the next window, so that only an epoch's end is left half empty.
_FULL = 0.97


class Schedule(Protocol):
    """What each step trains."""

    def step(self, step: int) -> list[Group]:
        """Groups of clip indices of one step, counted from 0; the same on every rank."""
        ...

    def epoch_of(self, step: int) -> int:
        """Epoch that a step begins in."""
        ...

    def waste(self, epoch: int) -> float:
        """Share of an epoch's token budget that holds no token."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Epoch:
    groups: list[Group]
    waste: float


class _Groups:
    """Steps over the groups of one epoch after the other."""

    def __init__(self, tokens: Sequence[int], *, budget: int, groups_per_step: int, seed: int) -> None:
        if not tokens:
            raise ValueError("tokens holds no clip; at least one is needed")
        if groups_per_step < 1:
            raise ValueError(f"groups_per_step must be at least 1, got {groups_per_step}")
        if min(tokens) < 1:
            raise ValueError(f"clip {tokens.index(min(tokens))} has {min(tokens)} tokens; at least 1 is needed")
        longest = max(tokens)
        if longest > budget:
            over = sum(count > budget for count in tokens)
            raise ValueError(
                f"{over} of {len(tokens)} clips have more tokens than the budget {budget}, the longest {longest} (clip "
                f"{tokens.index(longest)}); use a budget of {longest} or more, or cut shorter clips"
            )
        self.tokens = tuple(tokens)
        self.budget = budget
        self.groups_per_step = groups_per_step
        self.seed = seed
        # Groups before each epoch; epochs have different numbers of them.
        self._starts = [0]
        self._epochs: dict[int, _Epoch] = {}
        # Batches are built ahead in a thread, while the one that trains asks for its step's.
        self._lock = threading.Lock()

    def step(self, step: int) -> list[Group]:
        """See Schedule."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        first = step * self.groups_per_step
        return [self._group(index) for index in range(first, first + self.groups_per_step)]

    def epoch_of(self, step: int) -> int:
        """See Schedule."""
        return self._locate(step * self.groups_per_step)

    def waste(self, epoch: int) -> float:
        """See Schedule."""
        with self._lock:
            return self._epoch(epoch).waste

    def _group(self, index: int) -> Group:
        with self._lock:
            epoch = self._find(index)
            return self._epoch(epoch).groups[index - self._starts[epoch]]

    def _locate(self, index: int) -> int:
        with self._lock:
            return self._find(index)

    def _find(self, index: int) -> int:
        while self._starts[-1] <= index:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1).groups))
        return bisect_right(self._starts, index) - 1

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            # A step may reach over an epoch's end, no further back.
            for old in [kept for kept in self._epochs if kept < epoch - 1]:
                del self._epochs[old]
            groups = self._build(epoch)
            used = sum(self.tokens)
            self._epochs[epoch] = _Epoch(groups=groups, waste=1 - used / (len(groups) * self.budget))
        return self._epochs[epoch]

    def _build(self, epoch: int) -> list[Group]:
        raise NotImplementedError

    def _order(self, epoch: int) -> list[int]:
        generator = seeded_generator("packing", self.seed, epoch)
        return torch.randperm(len(self.tokens), generator=generator).tolist()


class PackedSchedule(_Groups):
    """Clips of different sizes, packed first-fit decreasing within windows of a shuffled epoch.

    Args:
        tokens: of each clip. budget: tokens that a group may hold.
        groups_per_step: packs of one step over all ranks and micro-batches.
        seed: of the run. window: clips sorted and packed at a time; more waste less and mix sizes less.

    Raises:
        ValueError: an argument is out of range, or a clip has more tokens than the budget: none is dropped in silence.
    """

    def __init__(
        self, tokens: Sequence[int], *, budget: int, groups_per_step: int = 1, seed: int = 0, window: int = 1024
    ) -> None:
        super().__init__(tokens, budget=budget, groups_per_step=groups_per_step, seed=seed)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window = window

    def _build(self, epoch: int) -> list[Group]:
        order = self._order(epoch)
        groups: list[Group] = []
        held: list[int] = []
        for start in range(0, len(order), self.window):
            packs = pack_first_fit([*held, *order[start : start + self.window]], self.tokens, self.budget)
            packs.sort(key=lambda pack: sum(self.tokens[clip] for clip in pack))
            held = []
            for pack in packs:
                full = sum(self.tokens[clip] for clip in pack) >= _FULL * self.budget
                last = start + self.window >= len(order)
                # At most half a window: clips that never fill a pack would pile up over an epoch.
                if full or last or len(held) + len(pack) > self.window // 2:
                    groups.append(pack)
                else:
                    held += pack
        # First-fit leaves the emptiest packs at a window's end; a step should not know where in a window it stands.
        generator = seeded_generator("packs", self.seed, epoch)
        return [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]


class BucketSchedule(_Groups):
    """Clips of equal size in dense batches: as many as the budget holds, fewer where a size's clips end.

    Args:
        sizes: (T, H, W) of each clip, in any unit. tokens: of each clip, the same for equal sizes.
        budget, groups_per_step, seed: see PackedSchedule.

    Raises:
        ValueError: as PackedSchedule, or sizes and tokens do not fit each other.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, ...]],
        tokens: Sequence[int],
        *,
        budget: int,
        groups_per_step: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(tokens, budget=budget, groups_per_step=groups_per_step, seed=seed)
        known: dict[tuple[int, ...], int] = {}
        if len(sizes) != len(tokens):
            raise ValueError(f"sizes has {len(sizes)} clips, tokens {len(tokens)}")
        for clip, (size, count) in enumerate(zip(sizes, tokens, strict=True)):
            if known.setdefault(tuple(size), count) != count:
                raise ValueError(f"clip {clip} of size {size} has {count} tokens, another of that size {known[size]}")
        self.sizes = [tuple(size) for size in sizes]

    def _build(self, epoch: int) -> list[Group]:
        filling: dict[tuple[int, ...], list[int]] = {}
        groups: list[Group] = []
        for clip in self._order(epoch):
            bucket = filling.setdefault(self.sizes[clip], [])
            bucket.append(clip)
            if (len(bucket) + 1) * self.tokens[clip] > self.budget:
                groups.append(tuple(filling.pop(self.sizes[clip])))
        groups += [tuple(rest) for rest in filling.values()]
        generator = seeded_generator("buckets", self.seed, epoch)
        return [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]


def pack_first_fit(clips: Sequence[int], tokens: Sequence[int], budget: int) -> list[Group]:
    """First-fit decreasing: clips from long to short, each into the first pack that has room.

    Args:
        clips: indices into tokens. tokens: of each clip. budget: of a pack, at least the longest clip.

    Returns:
        Packs in the order they were opened; clips of equal length keep their order.
    """
    ordered = sorted(clips, key=lambda clip: -tokens[clip])
    packs: list[list[int]] = []
    # A tree over packs whose nodes hold the most room of any pack below: the first that fits in log(packs).
    leaves = 1 << max(0, len(ordered) - 1).bit_length()
    room = [budget] * (2 * leaves)
    for clip in ordered:
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= tokens[clip] else 2 * node + 1
        pack = node - leaves
        if pack == len(packs):
            packs.append([])
        packs[pack].append(clip)
        room[node] -= tokens[clip]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [tuple(pack) for pack in packs]
