"""The moving average of a model's weights: a shard on each rank, beside the shard that the rank trains."""

from __future__ import annotations

import torch
from torch import Tensor

from longreel.parallel.engine import Engine, local_part


class ExponentialMovingAverage:
    """average <- decay average + (1 - decay) weights, after each step, in the dtype of the master weights.

    Args:
        engine: whose master weights are followed: shards under fsdp2 and colossalai, whole under ddp.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._average = {name: p.detach().clone() for name, p in engine.masters().items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Take the weights of now in."""
        masters = self._engine.masters()
        average = [local_part(self._average[name]) for name in masters]
        torch._foreach_lerp_(average, [local_part(p.detach()) for p in masters.values()], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """By the plain model's names, for a checkpoint; all ranks call it."""
        return self._engine.whole_masters(self._average)

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take what state() gave, after a checkpoint was read into it."""
        for name, part in self._engine.parts_of_masters(state).items():
            local_part(self._average[name]).copy_(local_part(part))
