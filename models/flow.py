"""Rectified flow: straight paths between data (t = 0) and noise (t = 1), and the Euler sampler along them.

x_t = (1 - t) x0 + t noise; the model predicts the velocity dx/dt = noise - x0.
Source: Liu et al. 2022, Flow Straight and Fast (arXiv:2209.03003); Lipman et al. 2022 (arXiv:2210.02747).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

# The model's timestep is t * TIMESTEP_SCALE, the range its sinusoidal embedding was made for.
TIMESTEP_SCALE = 1000.0

TimestepDistribution = Literal["uniform", "logit-normal"]


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


def guided_velocity(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: unconditional + scale * (conditional - unconditional); scale 1 is no guidance.

    Source: Ho and Salimans 2022 (arXiv:2207.12598), in the form in which 1 is neutral.
    """
    return unconditional + scale * (conditional - unconditional)


@torch.no_grad()
def euler_sample(
    velocity: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    num_steps: int,
    *,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from noise at t = 1 to data at t = 0 in equal Euler steps.

    Args:
        velocity: (x [B, ...], t in (0, 1]) -> [B, ...]; any dtype, the state keeps the noise's.
        noise: [B, ...], the state at t = 1.
        num_steps: N; the velocity is asked for at t = 1, (N-1)/N, ..., 1/N.
        on_step: called with the number of finished steps after each, for progress.

    Returns:
        [B, ...], the state at t = 0; exact for straight paths, whatever N.

    Raises:
        ValueError: num_steps is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    x = noise
    for step in range(num_steps):
        t = 1 - step / num_steps
        x = x - velocity(x, t).to(x.dtype) / num_steps
        if on_step is not None:
            on_step(step + 1)
    return x
