"""Which rank is gone: signs of life through the store of the rendezvous, watched from rank to rank.

A collective whose peer died says at best that a connection closed, and with NCCL may say nothing until its timeout.
Each rank's thread counts up a key of its own and watches that of the next rank; who stands still for too long is
named to all, as is a rank that raised. A rank that hears of it and is still held by a collective ends itself.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

# A rank without a sign of life for this long, or for the time limit of collectives if that is shorter, is lost.
LOST_SECONDS = 30.0
# How long a rank that hears of another's end has to end by itself, before its thread ends it.
GRACE_SECONDS = 5.0

_GONE = "gone"


class Liveness:
    """This rank's signs of life, and its watch over the next rank; a context manager around a rank's work.

    Args:
        store: of the rendezvous, which all ranks reach.
        rank, world_size: of this process. limit_s: silence after which a rank is lost.
        end: called from the thread with what happened, GRACE_SECONDS after it is known, if the work still runs.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, *, limit_s: float, end: Callable[[str], None]
    ) -> None:
        # A connection of its own: a rank that waits for a key holds its store's only one. Stubs do not know clone.
        self._store = dist.PrefixStore("longreel/alive", store.clone())  # type: ignore[attr-defined]
        self._rank, self._world_size = rank, world_size
        self._limit = limit_s
        self._beat = min(1.0, limit_s / 10)
        self._end = end
        self._stopped = threading.Event()
        self._known = threading.Event()
        self._what = ""
        self._seen, self._since = (rank, 0), time.monotonic()
        self._thread = threading.Thread(target=self._run, name="longreel-liveness", daemon=True)

    def __enter__(self) -> Liveness:
        self._store.set(f"where/{self._rank}", f"host {socket.gethostname()}, pid {os.getpid()}")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()
        try:
            if error is not None:
                self._tell(f"{self._name(self._rank)} failed: {kind.__name__ if kind else ''}: {error}")
            self._store.add(f"left/{self._rank}", 1)
        except dist.DistError:
            # The store went with the process that held it, which has ended before this rank.
            return

    def tell(self, what: str) -> None:
        """Make known that this rank will not go on; the first of all ranks to say so is heard."""
        try:
            self._tell(what)
        except dist.DistError:
            return

    @property
    def verdict_s(self) -> float:
        """Seconds within which the loss of a rank is known to all."""
        return self._limit + 6 * self._beat

    def wait(self, seconds: float) -> str:
        """What happened to which rank, once that is known; "" when it is not within `seconds`."""
        self._known.wait(seconds)
        return self._what

    def stuck(self, seconds: float) -> str:
        """Who lives but has not joined the collective that timed out here, given `seconds` for others to say the same.

        "" when every rank timed out or has left.
        """
        try:
            self._store.add(f"timed out/{self._rank}", 1)
            time.sleep(seconds)
            keys = ("timed out", "left")
            ranks = [
                rank for rank in range(self._world_size) if not any(self._store.add(f"{key}/{rank}", 0) for key in keys)
            ]
            return ", ".join(map(self._name, ranks))
        except dist.DistError:
            return ""

    def _tell(self, what: str) -> None:
        if self._store.add("told", 1) == 1:
            self._store.set(_GONE, " ".join(what.split())[:500])

    def _name(self, rank: int) -> str:
        where = f"where/{rank}"
        told = f" ({self._store.get(where).decode()})" if self._store.check([where]) else ""
        return f"rank {rank} of {self._world_size}{told}"

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self._beat):
                self._store.add(f"beat/{self._rank}", 1)
                if self._next_is_silent():
                    silent = ", ".join(map(self._name, self._all_silent()))
                    self._tell(f"gone, without a sign of life for {self._limit:g} s: {silent}")
                if self._store.check([_GONE]):
                    self._what = self._store.get(_GONE).decode()
                    break
        except dist.DistError:
            # Held by the first node's launcher, which outlives its ranks unless the node goes.
            self._what = "the node that holds the rendezvous is gone: its store does not answer"
        if self._what:
            self._known.set()
            if not self._stopped.wait(GRACE_SECONDS):
                self._end(self._what)

    def _next_is_silent(self) -> bool:
        """Whether the next rank that has not left in order has been silent for too long."""
        others = ((self._rank + i) % self._world_size for i in range(1, self._world_size))
        rank = next((rank for rank in others if not self._store.add(f"left/{rank}", 0)), None)
        if rank is None:
            return False
        seen, now = (rank, self._store.add(f"beat/{rank}", 0)), time.monotonic()
        # Not yet there counts as alive: starting takes as long as it takes.
        if seen != self._seen or seen[1] == 0:
            self._seen, self._since = seen, now
        return now - self._since >= self._limit

    def _all_silent(self) -> list[int]:
        """Every rank that stands still now: with one rank its launcher's others end, and with a node all of its."""
        ranks = [r for r in range(self._world_size) if r != self._rank and not self._store.add(f"left/{r}", 0)]
        before = [self._store.add(f"beat/{rank}", 0) for rank in ranks]
        time.sleep(3 * self._beat)
        return [rank for rank, count in zip(ranks, before, strict=True) if self._store.add(f"beat/{rank}", 0) == count]
