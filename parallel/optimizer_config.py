"""How a run optimises: data only, and the learning rate of each step, which follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW, its learning rate over time, and the moving average of the weights.

    Args:
        learning_rate: of AdamW, after warm-up.
        warmup_steps: steps over which the learning rate rises to its value.
        schedule: `constant` after warm-up, or `cosine`, falling to min_learning_rate at decay_steps.
        decay_steps: of `cosine`: the step at which it ends; None: the run's steps.
        min_learning_rate: of `cosine`.
        betas: of AdamW.
        weight_decay: of AdamW.
        clip_norm: gradients are scaled down to this global norm; None: not.
        accumulation: micro-batches that one step's samples are split into on each data-parallel rank.
        ema_decay: of the moving average of the weights, which sampling prefers; 0: none is kept. In early steps it is
            (1 + step) / (10 + step) if that is less.
    """

    learning_rate: float = 3e-3
    warmup_steps: int = 10
    schedule: Schedule = "constant"
    decay_steps: int | None = None
    min_learning_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_norm: float | None = None
    accumulation: int = 1
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"min_learning_rate must be between 0 and learning_rate {self.learning_rate}, "
                f"got {self.min_learning_rate}"
            )
        for name, least in (("warmup_steps", 0), ("decay_steps", 1), ("weight_decay", 0), ("accumulation", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value < 2**31:
                raise ValueError(f"{name} must be at least {least} and below 2**31, got {value}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}; got {self.schedule!r}")
        if self.decay_steps is not None and (self.schedule != "cosine" or self.decay_steps <= self.warmup_steps):
            raise ValueError(
                f"decay_steps goes with schedule 'cosine' and must be above warmup_steps {self.warmup_steps}, "
                f"got {self.decay_steps} with schedule {self.schedule!r}"
            )
        if self.schedule == "constant" and self.min_learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} goes with schedule 'cosine', which falls to it, got "
                "schedule 'constant'"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm must be positive and finite, got {self.clip_norm}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The learning rate of one step: a function of the step alone, so that a run goes on as if never interrupted.

    Args:
        config: warm-up and schedule. step: from 0. num_steps: of the run, for a cosine without decay_steps.
    """
    peak, low, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    warm = min(1.0, (step + 1) / (warmup + 1))
    if config.schedule == "constant" or step < warmup:
        return peak * warm
    end = max(config.decay_steps or num_steps, warmup + 1)
    done = min(1.0, (step - warmup) / (end - warmup))
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done))


def ema_decay(config: OptimizerConfig, step: int) -> float:
    """The decay of the moving average after `step` optimizer steps, from 1: small at first, when weights move far."""
    return min(config.ema_decay, (1 + step) / (10 + step))
