"""Checkpoints of a run while it trains: their score, what counts as saved, and what is said where one fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longreel.parallel.checkpoint_writer import CheckpointWriter
from longreel.parallel.comm import all_gather
from longreel.parallel.run_config import TrainConfig


class Saving:
    """Every rank has one; save() and close() are called by all of them.

    Args:
        folder: `checkpoints/` of the run. mesh: one axis over all ranks. config: what is kept, and how it is written.
        step: that the run begins at, which is saved. device: of losses. say: where remarks go.
    """

    def __init__(
        self,
        folder: Path,
        mesh: DeviceMesh,
        config: TrainConfig,
        *,
        step: int,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self._mesh, self._say = mesh, say
        self._writer = CheckpointWriter(
            folder, mesh, keep=config.keep, keep_best=config.keep_best, background=config.background_save
        )
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        # Of the steps since the last whole checkpoint, up to the newest that was begun; and that one's step.
        self._loss_unsaved = torch.zeros_like(self._loss)
        self._being_saved: int | None = None
        self.saved_at = step

    def note(self, loss: Tensor) -> None:
        """This rank's share of the loss of one step."""
        self._loss += loss.double()

    def save(self, step: int, state: Callable[[], dict[str, Any]], config: dict[str, Any], *, last: bool) -> None:
        """Have a step written, unless it is there; one that cannot be is a warning, unless it is the last.

        Args:
            step: done. state: makes it. config: for JSON. last: return when it is there.

        Raises:
            OSError: the last one cannot be written.
        """
        self.settle()
        if step == self.saved_at:
            return
        self._loss_unsaved += self._loss
        self._loss.zero_()
        mean = self._loss_unsaved / max(1, step - self.saved_at)
        score = float(all_gather(mean.reshape(1), self._mesh.get_group().group_name).mean())
        try:
            self._writer.save(step, state(), config, score=score)
            self._being_saved = step
            if last:
                self._writer.wait()
        except OSError as error:
            if last:
                raise
            self._warn(error)
        if last:
            self.settle()

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, and count as saved only what is there."""
        step, self._being_saved = self._being_saved, None
        try:
            self._writer.wait()
        except OSError as error:
            self._warn(error)
            return
        finally:
            for remark in self._writer.remarks():
                self._warn(remark)
        if step is not None:
            self.saved_at = step
            self._loss_unsaved.zero_()

    def close(self) -> None:
        """However training ends, a checkpoint that is being written becomes whole if its ranks live."""
        try:
            self._writer.close()
        except OSError as error:
            self._say(f"warning: {error}")
        for remark in self._writer.remarks():
            self._say(f"warning: {remark}")

    def _warn(self, what: object) -> None:
        """The next one may find room; what is there stays as it is."""
        self._say(f"warning: {what}; training goes on")
