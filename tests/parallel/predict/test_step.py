"""The fake step against hand formulas, against real allocations, and its continuation in depth against full depth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

from longreel.models.config import DiTConfig
from longreel.models.dit import DiT, parameter_count
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import ParallelMesh, build_mesh
from longreel.parallel.parallelize import ParallelDiT
from longreel.parallel.predict.depth import step_at_depth, trace_optimizer
from longreel.parallel.predict.fake_world import fake_world
from longreel.parallel.predict.step import (
    SizesOnly,
    StepTrace,
    allocate_state,
    build_optimizer,
    fake_batch,
    group_extents,
    trace_step,
)


def _parallel(**fields: Any) -> ParallelConfig:
    return ParallelConfig(precision="bf16", attention_provider="sdpa-flash", **fields)


def _trace(config: DiTConfig, parallel: ParallelConfig, ranks: int, latent_size: tuple[int, int, int]) -> StepTrace:
    with fake_world(ranks):
        mesh = build_mesh(sp_degree=parallel.sp_degree, ulysses_degree=parallel.ulysses_degree)
        return trace_step(config, parallel, mesh, latent_size=latent_size, batch=1)


def _continued(config: DiTConfig, parallel: ParallelConfig, ranks: int, latent_size: tuple[int, int, int]) -> StepTrace:
    with fake_world(ranks):
        mesh = build_mesh(sp_degree=1)
        one, two = (trace_optimizer(replace(config, depth=d), _parallel(), mesh) for d in (1, 2))
    with fake_world(ranks):
        mesh = build_mesh(sp_degree=parallel.sp_degree, ulysses_degree=parallel.ulysses_degree)
        return step_at_depth(config, parallel, mesh, (one, two), latent_size=latent_size, batch=1)


LONG, SHORT, ODD = (16, 64, 64), (1, 16, 16), (1, 2, 2002)


@pytest.mark.parametrize(
    ("parallel", "latent_size", "model"),
    [
        pytest.param({"policy": "full"}, LONG, {}, id="local-full-long"),
        pytest.param({"policy": "none"}, SHORT, {}, id="local-none-short"),
        pytest.param({"policy": "full", "engine": "fsdp2-zero3"}, SHORT, {}, id="local-full-zero3-short"),
        pytest.param({"strategy": "fastseq", "sp_degree": 2}, LONG, {}, id="fastseq2-none-long"),
        pytest.param(
            {"strategy": "fastseq", "sp_degree": 4, "fastseq_keep_gathered": True}, SHORT, {}, id="fastseq4-kept-short"
        ),
        pytest.param(
            {"strategy": "fastseq", "sp_degree": 4, "policy": "full"},
            ODD,
            {"conditioning": "cross", "text_only": True, "cross_layout": "published"},
            id="fastseq4-full-odd-published",
        ),
        pytest.param(
            {"strategy": "ulysses", "sp_degree": 8, "policy": "none"},
            ODD,
            {"conditioning": "in_context"},
            id="ulysses8-none-odd-in-context",
        ),
        pytest.param(
            {"strategy": "usp", "sp_degree": 4, "ulysses_degree": 2, "policy": "keep_attention", "mlp_tile": 512},
            LONG,
            {},
            id="usp4-keep-attention-tiled-long",
        ),
        pytest.param({"strategy": "ring", "sp_degree": 4, "policy": "offload"}, LONG, {}, id="ring4-offload-long"),
    ],
)
def test_continued_depth_equals_running_it(
    parallel: dict[str, Any], latent_size: tuple[int, int, int], model: dict[str, Any]
) -> None:
    config = DiTConfig(depth=6, hidden_size=256, num_heads=8, **model)
    whole = _trace(config, _parallel(**parallel), 8, latent_size)
    continued = _continued(config, _parallel(**parallel), 8, latent_size)
    assert continued.peaks == whole.peaks
    assert (continued.state, continued.kept) == (whole.state, whole.kept)
    assert continued.host_bytes == whole.host_bytes
    assert (whole.host_bytes > 0) == (parallel.get("policy") == "offload")
    assert continued.flops == whole.flops
    assert continued.sent() == whole.sent()
    # The optimizer's ops run over lists of parameters: their bytes continue, not their calls.
    for trace in (continued, whole):
        assert all(calls > 0 for cost, calls in trace.costs.items() if cost.phase != "optimizer")
    calls = [{c: n for c, n in t.costs.items() if c.phase != "optimizer"} for t in (continued, whole)]
    assert calls[0] == calls[1]
    moved = [sum(c.bytes * n for c, n in t.costs.items() if c.phase == "optimizer") for t in (continued, whole)]
    assert moved[0] == moved[1]


@pytest.mark.parametrize("ranks", [1, 4])
def test_state_is_twelve_bytes_a_parameter_over_the_ranks(ranks: int) -> None:
    config = DiTConfig(depth=2, hidden_size=256, num_heads=8)
    trace = _trace(config, _parallel(), ranks, SHORT)
    # One step counter per parameter tensor beside fp32 parameter, first and second moment.
    assert trace.state == pytest.approx(12 * parameter_count(config) / ranks, rel=0.01)
    # Gradients (fp32) join in the optimizer step, with one temporary of their size.
    assert trace.peaks["optimizer"] == pytest.approx(20 * parameter_count(config) / ranks, rel=0.03)


def test_full_recomputation_keeps_one_block_input_per_block() -> None:
    config = DiTConfig(depth=1, hidden_size=256, num_heads=8)
    one, two = (_trace(replace(config, depth=d), _parallel(policy="full"), 1, LONG) for d in (1, 2))
    block_input = 16 * 32 * 32 * 256 * 2
    gathered = 2 * (parameter_count(replace(config, depth=2)) - parameter_count(config))
    assert two.kept - one.kept == block_input + gathered


def test_without_recomputation_a_block_keeps_nineteen_hidden_states() -> None:
    config = DiTConfig(depth=1, hidden_size=256, num_heads=8)
    one, two = (_trace(replace(config, depth=d), _parallel(policy="none"), 1, LONG) for d in (1, 2))
    rows = 16 * 32 * 32
    # x and normed x (twice), q, k, v, attention's output, projection's output, 4 + 4 of the MLP, its output; Ulysses
    # and FastSeq keep one more, as heads and tokens have a buffer each. Then fp32 lse, means and deviations.
    hidden = (2 * 2 + 3 + 1 + 1 + 8 + 1) * rows * 256 * 2 + 4 * rows * (8 + 2 * 2)
    gathered = 2 * (parameter_count(replace(config, depth=2)) - parameter_count(config))
    assert two.kept - one.kept == pytest.approx(hidden + gathered, rel=1e-3)


REAL = [
    ("local", 1, "none", 2),
    ("local", 1, "full", 2),
    ("local", 1, "keep_attention", 2),
    ("ulysses", 2, "full", 2),
    ("ulysses", 2, "keep_attention", 2),
    ("fastseq", 4, "none", 2),
    ("ring", 2, "keep_attention", 2),
]
# With those: every strategy under every policy, and under both ZeRO stages.
MORE_REAL = [
    ("local", 1, "none", 3),
    ("local", 1, "offload", 3),
    ("ulysses", 4, "none", 3),
    ("ulysses", 2, "offload", 2),
    ("fastseq", 2, "full", 3),
    ("fastseq", 4, "keep_attention", 3),
    ("fastseq", 2, "offload", 2),
    ("ring", 4, "none", 3),
    ("ring", 2, "full", 3),
    ("ring", 4, "offload", 2),
    ("usp", 4, "none", 3),
    ("usp", 4, "full", 2),
    ("usp", 4, "keep_attention", 3),
    ("usp", 4, "offload", 2),
]


@pytest.mark.parametrize(
    ("strategy", "degree", "policy", "stage"),
    [*REAL, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_REAL)],
)
def test_peak_equals_real_allocations(strategy: str, degree: int, policy: str, stage: int) -> None:
    """Every allocation of a real step on the CPU, as the profiler saw them, the ops as they run there."""
    config = DiTConfig(depth=2, hidden_size=128, num_heads=4, conditioning="cross")
    hybrid = {"ulysses_degree": 2} if strategy == "usp" else {}
    parallel = _parallel(strategy=strategy, sp_degree=degree, policy=policy, engine=f"fsdp2-zero{stage}", **hybrid)
    latent_size = (8, 16, 32)
    with fake_world(degree):
        mesh = build_mesh(sp_degree=degree, ulysses_degree=parallel.ulysses_degree)
        predicted = trace_step(config, parallel, mesh, latent_size=latent_size, batch=1, open_pointwise=True)
        real = _real_peak(config, parallel, mesh, latent_size)
    assert predicted.peak - predicted.state == pytest.approx(real, rel=0.002)


def _real_peak(
    config: DiTConfig, parallel: ParallelConfig, mesh: ParallelMesh, latent_size: tuple[int, int, int]
) -> int:
    """Peak of what one step allocates, bytes, from the profiler's allocation events.

    Here the host is the device: what `offload` sends to host memory is let go, and comes back as new memory.
    """
    model = ParallelDiT(DiT(config), mesh, parallel, store=SizesOnly())
    optimizer = build_optimizer(model)
    allocate_state(optimizer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        batch = fake_batch(model, latent_size, 1)
        model.loss(batch).backward()
        optimizer.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("policy", ["none", "full"])
def test_gathered_hidden_states_are_kept_or_gathered_again(policy: str) -> None:
    config = DiTConfig(depth=2, hidden_size=256, num_heads=8)
    fields = {"strategy": "fastseq", "sp_degree": 4, "policy": policy}
    again, kept = (_trace(config, _parallel(**fields, fastseq_keep_gathered=k), 4, LONG) for k in (False, True))
    own = 16 * 32 * 32 // 4 * 256 * 2
    assert kept.kept - again.kept == (config.depth * 4 * own if policy == "none" else 0)
    # Of every block, one gathering of other ranks' x less.
    assert again.sent()["sequence.send"] - kept.sent()["sequence.send"] == config.depth * 3 * own
    assert kept.flops == again.flops


def test_extent_of_groups_on_the_ranks_of_the_world() -> None:
    with fake_world(16):
        mesh = build_mesh(sp_degree=8, ulysses_degree=2)
        names = mesh.sp_group, mesh.ulysses_group, mesh.ring_group, mesh.flat.get_group().group_name
        found = group_extents(mesh)
    # The ring's are ranks 0, 2, 4 and 6.
    assert [found[name] for name in names] == [8, 2, 7, 16]
