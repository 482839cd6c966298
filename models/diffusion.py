"""DDPM with 1000 linear betas: the model predicts the noise and, as a variance, how sure it is of each step back.

x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, a_t the product of (1 - beta) up to t. The loss is the mean square of the
noise's error plus the variational bound, whose gradient reaches the variance alone.
Source: Ho et al. 2020 (arXiv:2006.11239); Nichol and Dhariwal 2021 (arXiv:2102.09672), as the original DiT trains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Diffusion:
    """The objective `ddpm`, see longreel.models.objective.Objective; timesteps are 0 .. 999, 999 being noise."""

    @property
    def learn_sigma(self) -> bool:
        """The model predicts a variance beside the noise."""
        return True

    def draw_timestep(self, generator: torch.Generator) -> Tensor:
        """See Objective; uniform."""
        return torch.randint(NUM_TIMESTEPS, (1,), generator=generator, device=generator.device).float()

    def model_timestep(self, t: Tensor) -> Tensor:
        """See Objective."""
        return t

    def prepare(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See Objective; targets are x0, x_t and the noise."""
        if noise.shape != x0.shape or t.shape != x0.shape[:1]:
            raise ValueError(
                f"x0 {list(x0.shape)}, noise {list(noise.shape)} and t {list(t.shape)} must be [B, ...] twice, [B]"
            )
        kept = _at(alphas_cumprod(x0.device), t, x0)
        noised = kept.sqrt() * x0 + (1 - kept).sqrt() * noise
        return noised, (x0, noised, noise)

    def token_loss(self, output: Tensor, targets: tuple[Tensor, ...], t: Tensor) -> Tensor:
        """See Objective: mean square of epsilon's error, plus the variational bound of the variance in bits."""
        x0, noised, noise = targets
        epsilon, sigma = output.chunk(2, dim=-1)
        error = (epsilon - noise).square()
        # The bound teaches the variance alone: the mean is the mean square's business.
        bound = variational_bound(epsilon.detach(), sigma, x0, noised, t)
        return (error + bound).flatten(2).mean(-1)


def betas(device: torch.device | str = "cpu") -> Tensor:
    """The 1000 variances of the steps, fp64."""
    return torch.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=torch.float64, device=device)


def alphas_cumprod(device: torch.device | str = "cpu") -> Tensor:
    """a_t: the share of the data's variance left after step t, fp64 [1000]."""
    return (1 - betas(device)).cumprod(0)


def variational_bound(epsilon: Tensor, sigma: Tensor, x0: Tensor, noised: Tensor, t: Tensor) -> Tensor:
    """Bits per element by which the predicted step back from x_t misses the true one.

    KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for t > 0; for t = 0 the negative log-likelihood of x0 in bins of width
    2 / 255, the levels of an 8-bit picture in [-1, 1].

    Args:
        epsilon: predicted noise. sigma: the model's variance channels, an interpolation in [-1, 1] (not bounded) of
            log beta and the posterior's log variance. x0, noised: data and x_t. All [B, ...] of one shape. t: [B].

    Returns:
        [B, ...], of that shape.
    """
    device = x0.device
    beta, after = betas(device), alphas_cumprod(device)
    before = torch.cat([after.new_ones(1), after[:-1]])
    variance = beta * (1 - before) / (1 - after)
    # Zero at t = 0, where the next one stands in, as in the original.
    log_variance = torch.cat([variance[1:2], variance[1:]]).log()

    def at(table: Tensor) -> Tensor:
        return _at(table, t, x0)

    low, high = at(log_variance), at(beta.log())
    share = (sigma + 1) / 2
    predicted_log_variance = share * high + (1 - share) * low
    predicted_x0 = at(after.rsqrt()) * noised - at((1 / after - 1).sqrt()) * epsilon
    of_x0, of_noised = at(beta * before.sqrt() / (1 - after)), at((1 - before) * (1 - beta).sqrt() / (1 - after))
    mean, predicted_mean = (of_x0 * x + of_noised * noised for x in (x0, predicted_x0))
    divergence = 0.5 * (
        -1
        + predicted_log_variance
        - low
        + (low - predicted_log_variance).exp()
        + (mean - predicted_mean).square() * (-predicted_log_variance).exp()
    )
    likelihood = _log_likelihood(x0, predicted_mean, 0.5 * predicted_log_variance)
    first = (t == 0).reshape(-1, *[1] * (x0.dim() - 1))
    return torch.where(first, -likelihood, divergence) / math.log(2.0)


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of x's bin of width 2 / 255 under a Gaussian; the outermost bins reach to infinity."""
    inverse = (-log_scale).exp()
    above, below = (_cdf(inverse * (x - mean + side / 255)) for side in (1, -1))

    def log(p: Tensor) -> Tensor:
        return p.clamp(min=1e-12).log()

    return torch.where(x < -0.999, log(above), torch.where(x > 0.999, log(1 - below), log(above - below)))


def _cdf(x: Tensor) -> Tensor:
    """The normal distribution function in the tanh form that the original computes with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t] in like's dtype, shaped to multiply it."""
    return table[t.long()].to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))
