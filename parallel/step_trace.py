"""A trace of some training steps: what each rank computed and which transfers were in flight meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function


class StepTrace:
    """Records steps by torch.profiler into `folder/rank-N.json`, for chrome://tracing or ui.perfetto.dev.

    Args:
        folder: created when needed; None records nothing.
        steps: first and last step to record, counted from 1.
        rank: of this process. device: where it computes.
    """

    def __init__(self, folder: Path | None, steps: tuple[int, int], *, rank: int, device: torch.device) -> None:
        self._folder = folder
        self._steps = steps
        self._rank = rank
        self._device = device
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step; the file is written at the end of the last one to record.

        Raises:
            OSError: it cannot be written.
        """
        first, last = self._steps
        if self._folder is None or not first <= number <= last:
            yield
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        with record_function(f"step {number}"):
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        if number == last:
            self._profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._folder / f"rank-{self._rank}.json"))
            self._profile = None
