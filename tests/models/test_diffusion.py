"""models/diffusion.py: the original DiT's diffusion, and a bound whose gradient reaches the variance alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from longreel.models.diffusion import Diffusion, alphas_cumprod, betas, variational_bound

F64 = torch.float64


def draws(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=F64) for _ in range(4)]


def test_noise_is_added_as_diffusers_does() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    x0, noise, *_ = draws(3, 5, 4)
    t = torch.tensor([0, 500, 999])
    noised, targets = Diffusion().prepare(x0, noise, t.double())
    expected = scheduler.add_noise(x0, noise, t)
    torch.testing.assert_close(noised, expected, rtol=1e-5, atol=1e-6)
    assert all(a is b for a, b in zip(targets, (x0, noised, noise), strict=True))


def test_timesteps_are_whole_and_cover_the_range() -> None:
    objective, generator = Diffusion(), torch.Generator().manual_seed(0)
    t = torch.cat([objective.draw_timestep(generator) for _ in range(4000)])
    assert t.dtype == torch.float32
    assert torch.equal(t, t.round())
    assert (t.min(), t.max()) == (0, 999)
    assert abs(t.mean() - 499.5) < 15


@pytest.mark.parametrize("t", [1, 400, 999])
def test_bound_is_the_divergence_of_two_gaussians(t: int) -> None:
    """By numpy from the definitions: q(x_{t-1} | x_t, x0) against the model's, element by element."""
    x0, noise, epsilon, sigma = draws(1, 2, 3)
    b, kept = betas().numpy(), alphas_cumprod().numpy()
    xt = math.sqrt(kept[t]) * x0 + math.sqrt(1 - kept[t]) * noise
    found = variational_bound(epsilon, sigma, x0, xt, torch.tensor([t]))
    before = kept[t - 1]
    variance = b[t] * (1 - before) / (1 - kept[t])

    def mean(x: np.ndarray) -> np.ndarray:
        back = math.sqrt(before) * b[t] / (1 - kept[t]) * x
        return back + math.sqrt(1 - b[t]) * (1 - before) / (1 - kept[t]) * xt.numpy()

    said = (xt - math.sqrt(1 - kept[t]) * epsilon).numpy() / math.sqrt(kept[t])
    share = (sigma.numpy() + 1) / 2
    said_variance = np.exp(share * np.log(b[t]) + (1 - share) * np.log(variance))
    gap = mean(x0.numpy()) - mean(said)
    divergence = 0.5 * (np.log(said_variance / variance) + (variance + gap**2) / said_variance - 1)
    np.testing.assert_allclose(found.numpy(), divergence / math.log(2), rtol=1e-9)


def test_a_perfect_step_loses_nothing_but_what_the_last_bins_hold() -> None:
    x0, noise, *_ = draws(2, 3, 4, 1)
    t = torch.tensor([0.0, 700.0], dtype=F64)
    x0 = x0.clamp(-1, 1)
    _, targets = Diffusion().prepare(x0, noise, t)
    # sigma = -1: the posterior's own variance.
    output = torch.cat([noise, -torch.ones_like(noise)], dim=-1)
    loss = Diffusion().token_loss(output, targets, t)
    assert loss[1].abs().max() < 1e-9
    # Bins of 2 / 255 under a standard deviation of 0.007 or so: a bit or two.
    assert 0 < loss[0].min() < loss[0].max() < 3


def test_the_bound_teaches_the_variance_alone() -> None:
    x0, noise, epsilon, sigma = draws(1, 3, 4, 2)
    t = torch.tensor([300.0], dtype=F64)
    _, targets = Diffusion().prepare(x0, noise, t)
    output = torch.cat([epsilon, sigma], dim=-1).requires_grad_()
    Diffusion().token_loss(output, targets, t).sum().backward()
    assert output.grad is not None
    of_epsilon, of_sigma = output.grad.chunk(2, dim=-1)
    torch.testing.assert_close(of_epsilon, 2 * (epsilon - noise) / 8)
    assert of_sigma.abs().min() > 0


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"t \[2\] must be"):
        Diffusion().prepare(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2))
