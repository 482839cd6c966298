"""From noise to data by a trained model: Euler for flows, DDIM, DPM-Solver++ and DDPM's own steps by diffusers.

Every sampler asks for the model's output at (x, t) and guides it; t is in the objective's units.
Sources: Song et al. 2020, DDIM (arXiv:2010.02502); Lu et al. 2022, DPM-Solver++ (arXiv:2211.01095); Ho et al. 2020
(arXiv:2006.11239) with the variance and the spaced steps of Nichol and Dhariwal 2021 (arXiv:2102.09672).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, repeat
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from longreel.models.diffusion import BETA_END, BETA_START, NUM_TIMESTEPS, alphas_cumprod
from longreel.models.flow import RectifiedFlow, euler_sample
from longreel.models.objective import Objective

SamplerName = Literal["euler", "ddim", "dpm++", "ddpm"]

# What takes which steps; the first is what a sampling run takes if it names none.
_OF_FLOW: tuple[SamplerName, ...] = ("euler",)
_OF_DIFFUSION: tuple[SamplerName, ...] = ("dpm++", "ddim", "ddpm")


def choose_sampler(name: SamplerName | None, objective: Objective) -> SamplerName:
    """The sampler to take, the objective's first if none is named; ValueError if it does not go with the objective."""
    fitting = _OF_FLOW if isinstance(objective, RectifiedFlow) else _OF_DIFFUSION
    if name is None:
        return fitting[0]
    if name not in get_args(SamplerName) or name not in fitting:
        raise ValueError(f"sampler {name!r} does not go with this objective; those that do: {', '.join(fitting)}")
    return name


def guided(outputs: Tensor, scale: float, *, channels: int) -> Tensor:
    """Classifier-free guidance: null + scale * (conditional - null); scale 1 is the conditional output.

    Args:
        outputs: [2 N, ..., C_out]: N conditional outputs, then N of the null condition.
        scale: of guidance.
        channels: how many of the first channels are guided; the others are the conditional output's. The original DiT
            guides three of its four latent channels, and never the variance.

    Returns:
        [N, ..., C_out].

    Source: Ho and Salimans 2022 (arXiv:2207.12598), in the form in which 1 is neutral.
    """
    conditional, null = outputs.chunk(2)
    steered = null[..., :channels] + scale * (conditional[..., :channels] - null[..., :channels])
    return torch.cat([steered, conditional[..., channels:]], dim=-1)


@torch.no_grad()
def sample_latents(
    output: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    *,
    objective: Objective,
    sampler: SamplerName,
    num_steps: int,
    generator: torch.Generator | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Turn noise into data.

    Args:
        output: (x [B, ..., C], t) -> the model's guided output [B, ..., C_out].
        noise: [B, ..., C].
        objective: of the model. sampler: that choose_sampler gave for it.
        num_steps: from 1, for `ddpm` from 2; at most 1000 for samplers of diffusion.
        generator: of the noise that `ddpm` adds in each step, on the noise's device or the CPU.
        on_step: called with the number of finished steps after each.

    Returns:
        [B, ..., C] in the noise's dtype.

    Raises:
        ValueError: num_steps is out of range.
    """
    if sampler == "euler":
        assert isinstance(objective, RectifiedFlow)
        flow = objective
        return euler_sample(
            lambda x, t: flow.velocity(output(x, t), x, t), noise, num_steps, shift=flow.shift, on_step=on_step
        )
    fewest = 2 if sampler == "ddpm" else 1
    if not fewest <= num_steps <= NUM_TIMESTEPS:
        raise ValueError(f"steps must be between {fewest} and {NUM_TIMESTEPS} for sampler {sampler!r}, got {num_steps}")
    scheduler = _scheduler(sampler)
    scheduler.set_timesteps(timesteps=timesteps_of(sampler, num_steps))
    x, channels = noise, noise.shape[-1]
    for done, t in enumerate(scheduler.timesteps.tolist(), start=1):
        said = output(x, float(t)).to(x.dtype)
        # Schedulers count channels in the second dim, and only `ddpm` uses the variance.
        said = said if sampler == "ddpm" else said[..., :channels]
        stepped = scheduler.step(said.movedim(-1, 1), t, x.movedim(-1, 1), **_drawn(sampler, generator))
        x = stepped.prev_sample.movedim(1, -1).contiguous()
        if on_step is not None:
            on_step(done)
    return x


def timesteps_of(sampler: SamplerName, num_steps: int) -> list[int]:
    """The timesteps at which a sampler of diffusion asks the model, falling, num_steps different ones of 0 .. 999.

    `ddpm` takes the original DiT's, evenly from 999 down to 0. The others end one stride above the data, which they
    reach in the last step ("trailing", Lin et al. 2023, arXiv:2305.08891). num_steps as sample_latents takes it.
    """
    if sampler == "ddpm":
        # The original adds strides up in floating point, which decides how halves round.
        stride = (NUM_TIMESTEPS - 1) / (num_steps - 1)
        return [round(t) for t in accumulate(repeat(stride, num_steps - 1), initial=0.0)][::-1]
    # Not diffusers' own, whose floating-point range is one timestep too long for some numbers of steps, such as 61.
    return [round(NUM_TIMESTEPS * left / num_steps) - 1 for left in range(num_steps, 0, -1)]


def _drawn(sampler: SamplerName, generator: torch.Generator | None) -> dict[str, Any]:
    """How a scheduler that adds noise is told where it comes from."""
    return {"generator": generator} if sampler == "ddpm" else {}


def _scheduler(sampler: SamplerName) -> Any:
    """diffusers' scheduler over the betas that the model was trained with."""
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    betas = {
        "num_train_timesteps": NUM_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "linear",
    }
    if sampler != "ddpm":
        # DPM-Solver++ of order 1 is DDIM; diffusers' DDIM steps by 1000 // steps, past or short of the next timestep.
        order = 1 if sampler == "ddim" else 2
        return DPMSolverMultistepScheduler(**betas, algorithm_type="dpmsolver++", solver_order=order)
    scheduler: Any = DDPMScheduler(**betas, variance_type="learned_range", clip_sample=False)
    # In fp64, as the original's: betas of steps are differences of numbers close to 1.
    scheduler.alphas_cumprod = alphas_cumprod()
    return scheduler
