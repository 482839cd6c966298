"""models/samplers.py: a perfect model gives the data back; guidance, also on some channels; what goes with what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longreel.models.diffusion import Diffusion, alphas_cumprod
from longreel.models.flow import RectifiedFlow
from longreel.models.samplers import choose_sampler, guided, sample_latents

SHAPE = (2, 3, 4, 4, 5)


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
    # Data at t = 0 still holds the noise of the first beta, 0.01 of its deviation.
    assert (found - x0).abs().max() < 0.06


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
