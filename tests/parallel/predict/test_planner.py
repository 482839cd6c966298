"""The planner against running every configuration of its space, on random questions; and what it says when asked badly.

All questions are of a small model, so that predictions are many; thresholds in tokens are those of the real one.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from longreel.models.config import DiTConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.predict.hardware import PROFILES, GiB, get_profile
from longreel.parallel.predict.needs import Need, Setting
from longreel.parallel.predict.planner import candidates, impossible, least_seconds, plan, spread_name, spreads
from longreel.parallel.predict.predict import PredictionCase, grid_of, predict_step

BF16 = ParallelConfig(precision="bf16")


# Of each shape ten questions: a shape's runs are kept, whatever the memory and the GPU.
QUESTIONS_OF_SHAPE = 10


def question(seed: int) -> Setting:
    """A random setting whose memory lies between what some configurations need."""
    draw = random.Random(seed // QUESTIONS_OF_SHAPE)
    text_only = draw.random() < 0.3
    model = DiTConfig(
        depth=draw.choice([4, 5]),
        hidden_size=384,
        num_heads=draw.choice([4, 6, 8]),
        conditioning="cross" if text_only else draw.choice(["adaln", "cross", "in_context"]),
        text_only=text_only,
        cross_layout="published" if text_only else "replicated",
        max_text_tokens=20,
    )
    world_size = draw.choice([1, 2, 4] if seed >= QUESTIONS_OF_SHAPE else [2])
    tokens = draw.choice([2_048, 8_192, 10_000, 32_768] if seed >= QUESTIONS_OF_SHAPE else [2_048])
    samples = draw.choice([None, None, world_size])
    # Of what one hidden state of the whole sequence takes in every block.
    unit = tokens * model.hidden_size * 2 * model.depth
    draw = random.Random(seed)
    return Setting(
        model=model,
        world_size=world_size,
        grid=grid_of(tokens),
        samples=samples,
        limit_bytes=int(unit * math.exp(draw.uniform(math.log(0.5), math.log(30)))) + 64 * 2**20,
        host_limit_bytes=int(unit * draw.choice([0, 0.3, 10])),
        gpu=PROFILES[draw.choice(list(PROFILES))],
    )


def everything(setting: Setting) -> list[Need]:
    """Every configuration of the space, run; the fastest that fits of each spread, in the order of spreads."""
    best = []
    for spread in spreads(setting.world_size, BF16):
        if impossible(setting, spread) is None:
            needs = [setting.need(one) for one in candidates(spread)]
            for need in needs:
                assert setting.least_bytes(need.parallel) <= need.device_bytes, need.parallel
                assert least_seconds(setting, need.parallel) <= (need.seconds or 0), need.parallel
            fitting = [need for need in needs if need.fits]
            if fitting:
                best.append(min(fitting, key=lambda need: need.seconds or 0))
    return best


def holds(seed: int) -> None:
    setting = question(seed)
    best = everything(setting)
    if not best:
        with pytest.raises(ValueError, match="nothing fits"):
            plan(setting)
        return
    found = plan(setting)
    assert [found.best, *found.runners_up] == sorted(best, key=lambda need: (need.seconds or 0) / need.samples)
    # Verdicts and figures are the predictor's.
    for need in (found.best, *found.runners_up[:2]):
        batch = need.samples // need.parallel.dp_degree(setting.world_size)
        case = PredictionCase(
            model=setting.model,
            parallel=need.parallel,
            num_gpus=setting.world_size,
            target=setting.gpu.name if setting.gpu else "",
            seq_len=setting.tokens,
            batch_per_group=batch,
        )
        predicted = predict_step(case)
        assert (predicted.memory_bytes, predicted.step_s) == (need.device_bytes, need.seconds)
        assert predicted.memory_bytes <= setting.limit_bytes
    for refused in found.refused:
        need = setting.need(refused.parallel)
        assert not need.fits
        assert refused.device_bytes <= need.device_bytes
        assert refused.exact == (refused.device_bytes == need.device_bytes)


def test_choice_is_that_of_running_everything() -> None:
    holds(3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(QUESTIONS_OF_SHAPE, 50 + QUESTIONS_OF_SHAPE))
def test_choice_is_that_of_running_everything_on_fifty_questions(seed: int) -> None:
    holds(seed)


def setting(**changes: Any) -> Setting:
    given: dict[str, Any] = {
        "model": DiTConfig(depth=4, hidden_size=256, num_heads=8),
        "world_size": 2,
        "grid": (64, 16, 16),
        "limit_bytes": 1 << 40,
        "host_limit_bytes": 1 << 40,
        "gpu": get_profile("H100"),
    }
    return Setting(**(given | changes))


def test_runs_no_more_than_it_must() -> None:
    found = plan(setting())
    # What fits without recomputation is only challenged by keep_attention, whose backward may go by other chunks.
    assert found.runs <= 2 * len([found.best, *found.runners_up])
    assert not found.refused


def test_without_rates_least_is_recomputed_and_moved() -> None:
    roomy = plan(setting(gpu=None)).best
    assert (roomy.policy, roomy.parallel.strategy, roomy.seconds) == ("none", "local", None)
    less = plan(setting(gpu=None, limit_bytes=roomy.device_bytes - 1)).best
    assert less.device_bytes < roomy.device_bytes
    # Rates are of bf16.
    other = plan(setting(), ParallelConfig(precision="fp32"))
    assert other.best.seconds is None
    assert other.tokens_per_s(other.best) is None


def test_samples_of_a_step_are_shared_out() -> None:
    found = plan(setting(samples=1, world_size=4))
    assert {spread_name(need.parallel) for need in (found.best, *found.runners_up)} == {
        "ulysses SP 4",
        "fastseq SP 4",
        "ring SP 4",
        "usp SP 4 (2 x 2)",
    }
    assert ("local", "1 samples are fewer than its 4 groups") in found.impossible


def test_nothing_fits_says_what_comes_closest() -> None:
    with pytest.raises(ValueError, match=r"nothing fits 0.001 GiB per rank; the closest, .* needs .*GiB.*more GPUs"):
        plan(setting(limit_bytes=int(0.001 * GiB)))
    with pytest.raises(ValueError, match=r"plan 'auto' cannot foresee precision fp64"):
        plan(setting(), ParallelConfig(precision="fp64"))


def test_space_has_every_policy_tile_and_stage() -> None:
    names = [spread_name(one) for one in spreads(8, BF16)]
    assert len(names) == len(set(names)) == 1 + 3 * 3 + 3
    space = candidates(replace(BF16, strategy="fastseq", sp_degree=2))
    assert len({(one.policy, one.mlp_tile, one.engine) for one in space}) == 4 * 2 * 2
