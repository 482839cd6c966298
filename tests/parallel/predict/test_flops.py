"""Useful FLOPs in closed form against a counted step, and against the project's figures."""

from __future__ import annotations

from typing import Any

import pytest

from longreel.models.config import DiTConfig, dit_xl_2
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.predict.fake_world import fake_world
from longreel.parallel.predict.flops import useful_flops
from longreel.parallel.predict.step import trace_step

MODELS: dict[str, dict[str, Any]] = {
    "adaln": {"conditioning": "adaln"},
    "adaln-labels-sigma": {"conditioning": "adaln", "num_classes": 10, "learn_sigma": True},
    "cross": {"conditioning": "cross"},
    "cross-text-only": {"conditioning": "cross", "text_only": True},
    "in-context": {"conditioning": "in_context"},
}


@pytest.mark.parametrize("kind", MODELS)
def test_equal_to_the_counted_step_without_recomputation(kind: str) -> None:
    config = DiTConfig(depth=2, hidden_size=64, num_heads=4, max_text_tokens=12, text_dim=40, **MODELS[kind])
    parallel = ParallelConfig(precision="bf16", attention_provider="sdpa-flash")
    with fake_world(1):
        step = trace_step(config, parallel, build_mesh(sp_degree=1), latent_size=(3, 8, 8), batch=2)
    assert step.flops == 2 * useful_flops(config, num_video=3 * 4 * 4)


@pytest.mark.parametrize(("tokens", "petaflop"), [(614_400, 172), (819_200, 305)])
def test_published_figures_full_regime(tokens: int, petaflop: float) -> None:
    assert useful_flops(dit_xl_2(), num_video=tokens) / 1e15 == pytest.approx(petaflop, rel=0.005)


def test_published_figure_text_only() -> None:
    config = dit_xl_2(conditioning="cross", text_only=True, max_text_tokens=20)
    assert useful_flops(config, num_video=614_400) / 1e15 == pytest.approx(1.4, rel=0.02)
