"""All that changes from step to step: weights, optimizer, their moving average, the step; and one step of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longreel.parallel.checkpoint import load_checkpoint, read_run
from longreel.parallel.ema import ExponentialMovingAverage
from longreel.parallel.optimizer_config import OptimizerConfig, ema_decay, learning_rate
from longreel.parallel.parallelize import Batch, PackedBatch, ParallelDiT


class TrainState:
    """What a checkpoint holds.

    The learning rate, which samples a step takes, and what is random about each are functions of the step and the
    configuration: beside these tensors there is nothing to keep.

    Args:
        model: to be trained. choices: how. num_steps: of the run.
    """

    def __init__(self, model: ParallelDiT, choices: OptimizerConfig, num_steps: int) -> None:
        self.model = model
        self._choices, self._num_steps = choices, num_steps
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=choices.learning_rate, betas=choices.betas, weight_decay=choices.weight_decay
        )
        model.engine.attach(self.optimizer)
        self.ema = ExponentialMovingAverage(model.engine) if choices.ema_decay else None
        self.step = 0

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return learning_rate(self._choices, self.step, self._num_steps)

    def advance(self, micro_batches: Sequence[Batch | PackedBatch]) -> tuple[Tensor, Tensor]:
        """One optimizer step.

        Args:
            micro_batches: as many on every rank, at least one.

        Returns:
            (this rank's share of the loss, whose mean over all ranks is the loss; norm of all gradients).
        """
        engine = self.model.engine
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        losses = []
        for left, batch in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
            with engine.accumulating() if left else nullcontext():
                loss = self.model.loss(batch)
                engine.backward(loss)
            losses.append(loss.detach())
        norm = engine.clip(self._choices.clip_norm)
        engine.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(ema_decay(self._choices, self.step))
        return torch.stack(losses).sum(), norm

    def state(self) -> dict[str, Any]:
        """For torch.distributed.checkpoint; all ranks call it."""
        state = self.model.engine.state()
        return state if self.ema is None else state | {"ema": self.ema.state()}

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; ValueError if it holds another model."""
        state = self.state()
        load_checkpoint(checkpoint, state)
        self.model.engine.load_state(state)
        if self.ema is not None:
            self.ema.load_state(state["ema"])
        self.step = read_run(checkpoint)[0]
