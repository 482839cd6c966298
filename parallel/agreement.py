"""A cheap check that ranks hold the same host integers, for what collectives would turn into a hang or wrong data.

One all-gather of two numbers when they do. When they do not, every rank knows it and takes part in a second round that
carries the values, so that all of them raise the same error and none is left waiting.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence

import torch

from longreel.parallel import comm

# Values of one rank that an error shows, around the first that differs.
_SHOWN = 12


def check_agreement(name: str, values: Sequence[int], group: str, device: torch.device | str = "cpu") -> None:
    """Check that all ranks of a group hold the same integers; every rank of the group calls it, outside forward.

    On a fake group, where one process stands for all ranks, there is nothing to compare.

    Args:
        name: what the values are, for the error.
        values: integers of this rank; ranks may hold different numbers of them.
        group: name of the process group.
        device: one that the group can communicate from. Numbers are gathered on the host where the group takes
            tensors there, as by gloo in the groups of longreel.parallel.launch: nothing waits for the device then.

    Raises:
        ValueError: the values differ: on every rank of the group, with the ranks and their values.
    """
    if comm.group_size(group) == 1 or comm.is_fake(group):
        return
    if comm.takes_host_tensors(group):
        device = "cpu"
    text = ",".join(str(operator.index(value)) for value in values).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)
    everyone = comm.all_gather(torch.tensor([digest, len(text)], device=device), group).tolist()
    if all(row == everyone[0] for row in everyone):
        return
    # Text, not numbers: any integer fits, and a rank cannot fail here while the others wait for it.
    padded = text.ljust(max(length for _, length in everyone), b" ")
    rows = comm.all_gather(torch.tensor(list(padded), dtype=torch.uint8, device=device), group).tolist()
    raise ValueError(_difference(name, [[int(v) for v in bytes(row).split(b",") if v.strip()] for row in rows]))


def _difference(name: str, by_rank: list[list[int]]) -> str:
    """One line: which ranks hold what."""
    holders: dict[tuple[int, ...], list[int]] = {}
    for rank, values in enumerate(by_rank):
        holders.setdefault(tuple(values), []).append(rank)
    first = next(i for i in range(max(map(len, by_rank))) if len({tuple(values[i : i + 1]) for values in by_rank}) > 1)
    told = "; ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}: {_shown(values, first)}"
        for values, ranks in holders.items()
    )
    return f"{name} differ between the {len(by_rank)} ranks of a group, which must hold the same: {told}"


def _shown(values: tuple[int, ...], first: int) -> str:
    """The values, or those around index `first` of long ones."""
    if len(values) <= _SHOWN:
        return str(list(values))
    start = max(0, min(first - _SHOWN // 2, len(values) - _SHOWN))
    part = ", ".join(map(str, values[start : start + _SHOWN]))
    before, after = "..., " if start else "", ", ..." if start + _SHOWN < len(values) else ""
    return f"[{before}{part}{after}] ({len(values)} values, from index {start})"
