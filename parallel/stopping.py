"""How a run that is asked to end does so: all ranks after the same step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from longreel.parallel.comm import Exchange, group_size, start_all_reduce_sum


class Termination:
    """SIGTERM to any rank, agreed on by all of them; a context manager around the training loop.

    Schedulers and torchrun send it and kill some 30 s later. The flags travel behind each step: all ranks stop after
    the same one, at most two steps on, and no step waits for the network.

    Args:
        group: name of a group of all ranks that CPU tensors can be reduced over.
    """

    def __init__(self, group: str) -> None:
        self._group = group
        self._asked = False
        self._flight: Exchange | None = None
        self._before: Any = None

    def __enter__(self) -> Termination:
        # Only the main thread may; elsewhere the program around has its own way to end.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self._flight is not None and error is None:
            self._flight.wait()

    def agreed(self) -> bool:
        """Whether any rank had been asked to end one call ago; every rank calls it once a step and hears the same."""
        if group_size(self._group) == 1:
            return self._asked
        before = self._flight
        self._flight = start_all_reduce_sum(torch.tensor([int(self._asked)]), self._group)
        return before is not None and bool(before.wait().item())

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True
