"""models/flow.py: endpoints, velocities, and a sampler that is exact where Euler's method is."""

from __future__ import annotations

import math

import pytest
import torch

from longreel.models.flow import RectifiedFlow, euler_sample, interpolate, sample_timesteps, velocity_target


def test_endpoints_and_velocity_are_of_the_straight_path():
    x0, noise = torch.randn(2, 3, 5, 2, dtype=torch.float64), torch.randn(2, 3, 5, 2, dtype=torch.float64)
    assert torch.equal(interpolate(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(2)), noise)
    t, dt = torch.tensor([0.25, 0.6], dtype=torch.float64), 1e-4
    slope = (interpolate(x0, noise, t + dt) - interpolate(x0, noise, t - dt)) / (2 * dt)
    torch.testing.assert_close(slope, velocity_target(x0, noise), rtol=0, atol=1e-10)


def test_each_sample_has_its_own_t():
    x0, noise = torch.zeros(2, 4), torch.ones(2, 4)
    assert interpolate(x0, noise, torch.tensor([0.25, 0.5])).tolist() == [[0.25] * 4, [0.5] * 4]


@pytest.mark.parametrize("num_steps", [1, 3, 50])
def test_euler_is_exact_on_straight_paths(num_steps):
    x0, noise = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    # The velocity a perfect model of one data point predicts from x_t and t alone.
    out = euler_sample(lambda x, t: (x - x0) / t, noise, num_steps)
    torch.testing.assert_close(out, x0, rtol=0, atol=1e-12)


def test_euler_asks_at_these_times_and_reports_every_step():
    times: list[float] = []
    steps: list[int] = []

    def velocity(x, t):
        times.append(t)
        return torch.full_like(x, t)

    out = euler_sample(velocity, torch.zeros(1, dtype=torch.float64), 4, on_step=steps.append)
    assert times == [1.0, 0.75, 0.5, 0.25]
    assert steps == [1, 2, 3, 4]
    assert out.item() == -(1.0 + 0.75 + 0.5 + 0.25) / 4


def test_shifted_euler_steps_are_exact_on_straight_paths_and_lie_nearer_to_noise():
    x0, noise = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    times = []

    def velocity(x, t):
        times.append(t)
        return (x - x0) / t

    torch.testing.assert_close(euler_sample(velocity, noise, 4, shift=3.0), x0, rtol=0, atol=1e-12)
    assert times == pytest.approx([1, 0.9, 0.75, 0.5])


def test_euler_keeps_the_dtype_of_the_noise_and_no_graph():
    weight = torch.ones(1, requires_grad=True)
    out = euler_sample(lambda x, t: (x * weight).bfloat16(), torch.ones(2), 2)
    assert out.dtype == torch.float32
    assert not out.requires_grad


@pytest.mark.parametrize("distribution", ["uniform", "logit-normal"])
def test_timesteps_follow_the_generator_and_stay_in_range(distribution):
    def draw(seed):
        return sample_timesteps(torch.Generator().manual_seed(seed), 20_000, distribution=distribution)

    t = draw(3)
    assert torch.equal(t, draw(3))
    assert not torch.equal(t, draw(4))
    assert t.dtype == torch.float32
    assert t.min() >= 0
    assert t.max() < 1
    assert abs(t.mean() - 0.5) < 0.01
    middle = ((t > 0.25) & (t < 0.75)).float().mean()
    # P(|N(0, 1)| < log 3) = 0.728 for the logit-normal.
    assert abs(middle - (0.5 if distribution == "uniform" else 0.728)) < 0.015


def test_a_perfect_prediction_of_x0_loses_nothing_and_samples_the_data():
    flow = RectifiedFlow(prediction="x0")
    x0, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    t = torch.tensor([0.5, 0.01], dtype=torch.float64)
    _, targets = flow.prepare(x0, noise, t)
    shaped = [target[..., None] for target in targets]
    assert torch.equal(flow.token_loss(x0[..., None], shaped, t), torch.zeros(2, 3, dtype=torch.float64))
    out = euler_sample(lambda x, time: flow.velocity(x0, x, time), noise, 7)
    torch.testing.assert_close(out, x0, rtol=0, atol=1e-12)


def test_shifted_timesteps_lie_nearer_to_noise():
    def mean(shift):
        flow, generator = RectifiedFlow(shift=shift), torch.Generator().manual_seed(0)
        return torch.cat([flow.draw_timestep(generator) for _ in range(2000)]).mean()

    # The mean of s u / (1 + (s - 1) u) over u in [0, 1] at s = 3 is 1.5 - 0.75 log 3.
    assert mean(3.0) == pytest.approx(1.5 - 0.75 * math.log(3), abs=0.02)
    assert mean(1.0) == pytest.approx(0.5, abs=0.02)


def test_an_error_of_x0_weighs_as_that_of_the_velocity():
    x0, noise, error = (torch.randn(2, 3, 4, 1, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0.5, 0.2], dtype=torch.float64)
    said = x0 + error
    by_x0 = RectifiedFlow(prediction="x0").token_loss(said, (x0,), t)
    x_t = interpolate(x0, noise, t)
    velocity = (x_t - said) / t.view(-1, 1, 1, 1)
    by_velocity = RectifiedFlow().token_loss(velocity, (velocity_target(x0, noise),), t)
    torch.testing.assert_close(by_x0, by_velocity)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: euler_sample(lambda x, t: x, torch.zeros(1), 0), "num_steps"),
        (lambda: sample_timesteps(torch.Generator(), 1, distribution="normal"), "distribution"),
        (lambda: interpolate(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)), r"t \[3\]"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
