"""Rectified flow: straight paths between data (t = 0) and noise (t = 1), and the Euler sampler along them.

x_t = (1 - t) x0 + t noise; the model predicts the velocity dx/dt = noise - x0, or x0 itself, from which it follows.
Source: Liu et al. 2022, Flow Straight and Fast (arXiv:2209.03003); Lipman et al. 2022 (arXiv:2210.02747).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

# The model's timestep is t * TIMESTEP_SCALE, the range its sinusoidal embedding was made for.
TIMESTEP_SCALE = 1000.0

TimestepDistribution = Literal["uniform", "logit-normal"]
FlowPrediction = Literal["velocity", "x0"]
AnyTime = TypeVar("AnyTime", float, Tensor)

# Below this t the error of a predicted x0 is not weighed up any further: its weight 1 / t^2 would go to infinity.
MIN_WEIGHED_T = 0.05


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise.

    Args:
        x0, noise: [B, ...], any part of a sample (all of it, or one rank's rows).
        t: [B] in [0, 1].

    Returns:
        [B, ...].

    Raises:
        ValueError: shapes that do not fit.
    """
    if noise.shape != x0.shape or t.shape != x0.shape[:1]:
        raise ValueError(
            f"x0 {list(x0.shape)}, noise {list(noise.shape)} and t {list(t.shape)} must be [B, ...] twice, [B]"
        )
    t = t.reshape(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the model learns to predict at every t: noise - x0, [B, ...]."""
    return noise - x0


def sample_timesteps(
    generator: torch.Generator,
    num_samples: int,
    *,
    distribution: TimestepDistribution = "uniform",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Training timesteps.

    Args:
        generator: where the randomness comes from; the result lives on its device.
        num_samples: how many.
        distribution: `uniform` on [0, 1), the original rectified flow; or `logit-normal`, sigmoid of a standard normal,
            which favours the middle (Esser et al. 2024, arXiv:2403.03206).
        dtype: float32 or float64.

    Returns:
        [num_samples] in [0, 1); the model's timestep is this times TIMESTEP_SCALE.

    Raises:
        ValueError: unknown distribution.
    """
    if distribution == "uniform":
        return torch.rand(num_samples, generator=generator, dtype=dtype, device=generator.device)
    if distribution == "logit-normal":
        return torch.randn(num_samples, generator=generator, dtype=dtype, device=generator.device).sigmoid()
    raise ValueError(f"distribution must be uniform or logit-normal, got {distribution!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RectifiedFlow:
    """The objective `flow`, see longreel.models.objective.Objective.

    Args:
        prediction: `velocity`; or `x0`, from which the velocity (x_t - x0) / t follows and whose error is weighed as
            that of the velocity is. Patches of many numbers on a narrow model need it: noise fills all of a patch's
            dimensions and does not fit through the model, data does (Li and He 2025, arXiv:2511.13720).
        distribution: of training timesteps, see sample_timesteps.
        shift: moves timesteps of training and sampling towards noise where above 1, see shifted.
        min_weighed_t: of prediction `x0`: its error weighs 1 / max(t, this)^2. At 0.05 small t, where the picture is
            all but there, are most of the loss; nearer to 1 what is where counts for more.
    """

    prediction: FlowPrediction = "velocity"
    distribution: TimestepDistribution = "uniform"
    shift: float = 1.0
    min_weighed_t: float = MIN_WEIGHED_T

    def __post_init__(self) -> None:
        for name, kind in (("prediction", FlowPrediction), ("distribution", TimestepDistribution)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be positive and finite, got {self.shift}")
        if not 0 < self.min_weighed_t <= 1:
            raise ValueError(f"min_weighed_t must be above 0 and at most 1, got {self.min_weighed_t}")

    @property
    def learn_sigma(self) -> bool:
        """No variance is learned."""
        return False

    def draw_timestep(self, generator: torch.Generator) -> Tensor:
        """See Objective."""
        t = sample_timesteps(generator, 1, distribution=self.distribution)
        return shifted(t, self.shift)

    def model_timestep(self, t: Tensor) -> Tensor:
        """See Objective."""
        return t * TIMESTEP_SCALE

    def prepare(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See Objective."""
        target = velocity_target(x0, noise) if self.prediction == "velocity" else x0
        return interpolate(x0, noise, t), (target,)

    def token_loss(self, output: Tensor, targets: tuple[Tensor, ...], t: Tensor) -> Tensor:
        """See Objective: the mean square of the velocity's error."""
        error = (output[..., : targets[0].shape[-1]] - targets[0]).square().flatten(2).mean(-1)
        return error if self.prediction == "velocity" else error / t[:, None].clamp(min=self.min_weighed_t).square()

    def velocity(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """The velocity at (x, t > 0) that an output for it, [B, ...] as x, stands for."""
        return output if self.prediction == "velocity" else (x - output) / t


def shifted(t: AnyTime, shift: float) -> AnyTime:
    """shift t / (1 + (shift - 1) t): 0 and 1 stay, what is between moves towards noise where shift is above 1.

    Data of many alike numbers, such as large flat patches, show through much noise: what is where is decided close to
    t = 1, where the fewer timesteps would be, the more numbers there are.
    Source: Esser et al. 2024 (arXiv:2403.03206), section 5.3.2.
    """
    return shift * t / (1 + (shift - 1) * t)


@torch.no_grad()
def euler_sample(
    velocity: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    num_steps: int,
    *,
    shift: float = 1.0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from noise at t = 1 to data at t = 0 in Euler steps.

    Args:
        velocity: (x [B, ...], t in (0, 1]) -> [B, ...]; any dtype, the state keeps the noise's.
        noise: [B, ...], the state at t = 1.
        num_steps: N; the velocity is asked for at t = 1, (N-1)/N, ..., 1/N.
        shift: moves these times towards noise where above 1, so that more steps are taken there, see shifted.
        on_step: called with the number of finished steps after each, for progress.

    Returns:
        [B, ...], the state at t = 0; exact for straight paths, whatever N.

    Raises:
        ValueError: num_steps is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    x = noise
    times = [shifted(1 - step / num_steps, shift) for step in range(num_steps + 1)]
    for step, (t, after) in enumerate(pairwise(times)):
        x = x - velocity(x, t).to(x.dtype) * (t - after)
        if on_step is not None:
            on_step(step + 1)
    return x
