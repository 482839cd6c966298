"""models/samplers.py: a perfect model gives the data back, a Gaussian's its deviation; `ddpm` steps as the original.

Guidance, also on some channels; what goes with what.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longreel.models.diffusion import Diffusion, alphas_cumprod
from longreel.models.flow import RectifiedFlow
from longreel.models.samplers import choose_sampler, guided, sample_latents, timesteps_of

SHAPE = (2, 3, 4, 4, 5)
KEPT = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def perfect(x0: Tensor) -> object:
    """The output of a model that knows x0: epsilon, and the posterior's variance."""

    def output(x: Tensor, t: float) -> Tensor:
        kept = alphas_cumprod()[int(t)].to(x.dtype)
        epsilon = (x - kept.sqrt() * x0) / (1 - kept).sqrt()
        return torch.cat([epsilon, -torch.ones_like(epsilon)], dim=-1)

    return output


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 4), ("ddim", 50), ("dpm++", 20), ("ddpm", 50)])
def test_a_perfect_diffusion_model_gives_the_data_back(sampler: str, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    done: list[int] = []
    found = sample_latents(
        perfect(x0),  # type: ignore[arg-type]
        noise,
        objective=Diffusion(),
        sampler=sampler,  # type: ignore[arg-type]
        num_steps=steps,
        generator=generator,
        on_step=done.append,
    )
    assert done == list(range(1, steps + 1))
    assert found.shape == noise.shape
    assert found.dtype == noise.dtype
    assert (found - x0).abs().max() < 1e-4


def gaussian_epsilon(x: Tensor, t: float, std: float = 0.5) -> Tensor:
    """The noise expected in x at t where data are Gaussian, of mean 0."""
    kept = KEPT[int(t)]
    return x * (1 - kept).sqrt() / (kept * std**2 + 1 - kept)


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [("ddim", 61), ("ddim", 300), ("ddim", 500), ("ddim", 600), ("ddim", 700), ("dpm++", 61), ("dpm++", 300)],
)
def test_a_gaussian_model_gives_its_deviation_for_any_number_of_steps(sampler: str, steps: int) -> None:
    asked: list[float] = []

    def output(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return gaussian_epsilon(x, t)

    # Without noise in the steps each sample is a multiple of its noise: the deviation.
    noise = torch.tensor([[-2.0], [1.0]], dtype=torch.float64)
    found = sample_latents(output, noise, objective=Diffusion(), sampler=sampler, num_steps=steps)  # type: ignore[arg-type]
    # DDIM is of first order: its own equation gives 0.4950 of 300 steps, 0.4970 of 500.
    torch.testing.assert_close(found / noise, torch.full_like(noise, 0.5), rtol=0, atol=2 / steps)
    assert asked == timesteps_of(sampler, steps)  # type: ignore[arg-type]


def test_ddim_steps_by_its_equation() -> None:
    noise = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    steps = [999, 856, 713, 570, 428, 285, 142]
    x = noise.double()
    for t, following in zip(steps, [*steps[1:], None], strict=True):
        before = KEPT.new_ones(()) if following is None else KEPT[following]
        epsilon = x.sin()
        x0 = (x - (1 - KEPT[t]).sqrt() * epsilon) / KEPT[t].sqrt()
        x = before.sqrt() * x0 + (1 - before).sqrt() * epsilon
    found = sample_latents(lambda x, t: x.sin(), noise, objective=Diffusion(), sampler="ddim", num_steps=7)
    torch.testing.assert_close(found.double(), x, rtol=1e-4, atol=1e-4)


def test_timesteps_are_as_many_as_asked_for_and_fall() -> None:
    for steps in range(2, 1001):
        for sampler in ("ddim", "dpm++", "ddpm"):
            found = timesteps_of(sampler, steps)  # type: ignore[arg-type]
            assert len(found) == steps
            assert found == sorted(set(found), reverse=True)
            assert found[0] == 999
            assert found[-1] == (0 if sampler == "ddpm" else round(1000 / steps) - 1)
    assert timesteps_of("ddpm", 5) == [999, 749, 500, 250, 0]
    assert timesteps_of("ddpm", 250)[-3:] == [8, 4, 0]
    # The tenth stride of 49.95 adds up to a little less than 499.5.
    assert timesteps_of("ddpm", 21)[9:12] == [549, 499, 450]


def plain_ddpm(output: object, x: Tensor, steps: list[int], generator: torch.Generator) -> Tensor:
    """Ho et al. 2020, algorithm 2, on betas of the kept steps, with Nichol and Dhariwal's variance (their eq. 15)."""
    for t, following in zip(steps, [*steps[1:], None], strict=True):
        before = KEPT.new_ones(()) if following is None else KEPT[following]
        beta = 1 - KEPT[t] / before
        epsilon, v = output(x, float(t)).chunk(2, dim=-1)  # type: ignore[operator]
        x = (x - beta / (1 - KEPT[t]).sqrt() * epsilon) / (1 - beta).sqrt()
        if following is not None:
            share, posterior = (v + 1) / 2, beta * (1 - before) / (1 - KEPT[t])
            # Noise is drawn channels first.
            drawn = torch.randn(x.movedim(-1, 1).shape, generator=generator, dtype=x.dtype).movedim(1, -1)
            x = x + (share * beta.log() + (1 - share) * posterior.log()).mul(0.5).exp() * drawn
    return x


@pytest.mark.parametrize("steps", [2, 21, 250, 300])
def test_ddpm_steps_as_the_original(steps: int) -> None:
    def output(x: Tensor, t: float) -> Tensor:
        # A variance between its bounds and past them, as a model's is.
        return torch.cat([gaussian_epsilon(x, t) * (1 + 0.1 * x.tanh()), 1.5 * (3 * x + t).sin()], dim=-1)

    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stride, t, taken = 999 / (steps - 1), 0.0, []
    for _ in range(steps):
        taken.insert(0, round(t))
        t += stride
    expected = plain_ddpm(output, noise, taken, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    found = sample_latents(output, noise, objective=Diffusion(), sampler="ddpm", num_steps=steps, generator=generator)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_noise_of_ddpm_follows_its_generator() -> None:
    def run(seed: int) -> Tensor:
        noise = torch.ones(SHAPE)
        return sample_latents(
            lambda x, t: torch.cat([x * 0.1, x * 0], dim=-1),
            noise,
            objective=Diffusion(),
            sampler="ddpm",
            num_steps=5,
            generator=torch.Generator().manual_seed(seed),
        )

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_guidance_is_neutral_at_one_and_null_at_zero() -> None:
    conditional, null = torch.randn(1, 2, 4, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    both = torch.cat([conditional, null])
    torch.testing.assert_close(guided(both, 1.0, channels=4), conditional)
    assert torch.equal(guided(both, 0.0, channels=4), null)
    torch.testing.assert_close(guided(both, 4.0, channels=4), 4 * conditional - 3 * null)


def test_the_original_guides_three_channels() -> None:
    conditional, null = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    found = guided(torch.cat([conditional, null]), 4.0, channels=3)
    torch.testing.assert_close(found[..., :3], (4 * conditional - 3 * null)[..., :3])
    assert torch.equal(found[..., 3:], conditional[..., 3:])


def test_samplers_go_with_objectives() -> None:
    assert choose_sampler(None, RectifiedFlow()) == "euler"
    assert choose_sampler(None, Diffusion()) == "dpm++"
    assert choose_sampler("ddpm", Diffusion()) == "ddpm"
    with pytest.raises(ValueError, match="sampler 'ddim' does not go with this objective; those that do: euler"):
        choose_sampler("ddim", RectifiedFlow())
    with pytest.raises(ValueError, match=r"those that do: dpm\+\+, ddim, ddpm"):
        choose_sampler("euler", Diffusion())
    with pytest.raises(ValueError, match="steps must be between 1 and 1000"):
        sample_latents(lambda x, t: x, torch.ones(1, 1), objective=Diffusion(), sampler="ddim", num_steps=1001)
    with pytest.raises(ValueError, match="steps must be between 2 and 1000 for sampler 'ddpm', got 1"):
        sample_latents(lambda x, t: x, torch.ones(1, 1), objective=Diffusion(), sampler="ddpm", num_steps=1)
