"""Lets ColossalAI train on gloo ranks, whose optimizer asserts an accelerator named cuda or npu, with streams."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from colossalai.accelerator import CpuAccelerator, set_accelerator


class CpuCalledCuda(CpuAccelerator):
    """The CPU, under the name cuda. There are no streams: what runs, runs at once."""

    def __init__(self) -> None:
        super().__init__()
        self._name = "cuda"

    def Stream(self, *args: Any, **kwargs: Any) -> None:
        """No stream."""

    def current_stream(self, device: Any = None) -> None:
        """No stream."""

    def stream(self, stream_: None) -> AbstractContextManager[None]:
        """Nothing to select."""
        return nullcontext()

    def synchronize(self, device: Any = None) -> None:
        """Nothing to wait for."""


def use() -> None:
    """For the rest of this process."""
    set_accelerator(CpuCalledCuda())
