"""longreel.bench.presets, modes and reproduce: what each sweep holds, where it runs, how to name one of its points."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from longreel.bench.cases import Point
from longreel.bench.console import parse
from longreel.bench.grids import BASELINE, measured_points, target_points
from longreel.bench.modes import Machine
from longreel.bench.options import SweepConfig
from longreel.bench.presets import H800_LENGTHS, PRESETS, Sweep
from longreel.bench.reproduce import reproduce
from longreel.bench.run import pool_size
from longreel.parallel.config import ParallelConfig
from longreel.reports.turns import MIN_DECISIVE

NO_GPU, ONE_GPU, NODE = Machine(), Machine(num_gpus=1, gpu_name="NVIDIA H200"), Machine(num_gpus=8, gpu_name="H800")


def points_of(sweep: Sweep) -> list[Point]:
    measured = [point for grid in sweep.measured for point in measured_points(grid, device="H800")]
    points = measured + [point for grid in sweep.targets for group in target_points(grid) for point in group]
    # Grids share the baseline, which runs once.
    return list({point.key({}): point for point in points}.values())


# Preset, mode and machine: every mode that each preset has.
RUNS = [
    (name, mode, machine)
    for name in PRESETS
    for mode, machine in (("auto", NO_GPU), ("measured", NO_GPU), ("measured", NODE), ("emulated", ONE_GPU))
    if (name, mode, machine) != ("headline", "measured", NO_GPU)
]


def resolved(name: str, machine: Machine = NO_GPU, **options) -> Sweep:
    return SweepConfig(**({"preset": name} | options)).resolve(machine)


@pytest.mark.parametrize(("name", "mode", "machine"), RUNS, ids=lambda value: str(getattr(value, "num_gpus", value)))
def test_there_is_exactly_one_baseline_at_every_length(name, mode, machine) -> None:
    points = points_of(resolved(name, machine, mode=mode))
    assert points
    where = {(p.kind, p.model_name, p.model.text_only, p.device_type, p.num_devices, p.seq_len) for p in points}
    baselines = [p for p in points if p.is_baseline]
    assert len(baselines) == len(where)
    for point in baselines:
        assert point.parallel == ParallelConfig(**BASELINE, precision=point.parallel.precision)


@pytest.mark.parametrize(("name", "mode", "machine"), RUNS, ids=lambda value: str(getattr(value, "num_gpus", value)))
def test_the_command_of_a_point_makes_this_point_alone(name, mode, machine) -> None:
    points = [point for point in points_of(resolved(name, machine, mode=mode)) if point.impossible is None]
    # A dozen of each show every option in seconds instead of minutes.
    for point in points[:: max(1, len(points) // 12)]:
        command = shlex.split(reproduce(point))
        assert command[:2] == ["python", "bench/sweep.py"]
        (same,) = points_of(parse(command[2:]).resolve(machine))
        # How often it is timed is the preset's, and may be said.
        assert replace(same, timing=point.timing, device=point.device) == point


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "headline"])
def test_points_on_gpus_have_the_time_that_the_longest_step_takes(name) -> None:
    """The command of docs/sweep.md, and that of any row: 26 minutes a step at 819,200 tokens, four steps at least."""
    sweep = resolved(name, NODE, mode="measured", gpus=8, seq_lens="64k,819200", policies="full")
    on_gpus = [grid for grid in sweep.measured if grid.device_type == "cuda"]
    assert on_gpus
    assert all(grid.point_timeout_s >= 4 * 26 * 60 for grid in on_gpus)
    (grid, *_) = resolved(name, NODE, mode="measured", gpus=8, seq_lens="64k", point_timeout=90.0).measured
    assert grid.point_timeout_s == 90.0


def test_blog_has_every_published_row_with_its_baseline_in_both_regimes_and_layouts() -> None:
    points = points_of(resolved("blog"))
    rows = {(8, 614_400, "fastseq"), (4, 614_400, "ulysses"), (8, 819_200, "ulysses")}
    for regime, layout in (("text_only", "published"), ("text_only", "replicated"), ("full", "replicated")):
        found = [p for p in points if (p.regime, p.model.cross_layout) == (regime, layout)]
        for gpus, seq_len, strategy in rows:
            here = [p for p in found if (p.num_devices, p.seq_len) == (gpus, seq_len)]
            assert [p.parallel.policy for p in here if p.is_baseline] == ["full"]
            policies = {p.parallel.policy for p in here if (p.strategy, p.parallel.sp_degree) == (strategy, 2)}
            # With recomputation and without.
            assert policies == {"none", "keep_attention", "full"}
    assert {p.model.depth for p in points} == {28}


def test_h800_is_every_strategy_degree_policy_and_length() -> None:
    points = points_of(resolved("h800"))
    assert len(H800_LENGTHS) == 12
    assert (min(H800_LENGTHS), max(H800_LENGTHS)) == (8_192, 819_200)
    seen = {(p.strategy, p.parallel.sp_degree, p.parallel.policy, p.seq_len) for p in points}
    for seq_len in H800_LENGTHS:
        for policy in ("none", "keep_attention", "full", "offload"):
            assert ("local", 1, policy, seq_len) in seen
            for degree in (2, 4, 8):
                for strategy in ("ulysses", "fastseq", "ring", "usp"):
                    # Of two ranks USP is either of its halves.
                    assert ((strategy, degree, policy, seq_len) in seen) == (strategy != "usp" or degree > 2)
    assert all(grid.search for grid in resolved("h800").targets)


def test_compare_names_what_other_projects_run() -> None:
    points = points_of(resolved("compare", NODE, mode="measured"))
    assert {p.peer for p in points} == {None, "deepspeed-ulysses", "yunchang-usp"}
    assert {p.strategy for p in points if p.parallel.engine == "colossalai"} == {"local"}
    for point in points:
        if point.peer == "yunchang-usp":
            assert (point.parallel.sp_degree, point.parallel.ulysses_degree) in ((4, 2), (8, 4))


@pytest.mark.parametrize(
    ("machine", "kinds"), [(NO_GPU, {"predicted"}), (ONE_GPU, {"emulated"}), (NODE, {"measured"})], ids=["0", "1", "8"]
)
def test_the_machine_chooses_the_mode(machine, kinds) -> None:
    points = points_of(resolved("blog", machine))
    assert {p.kind for p in points} == kinds
    assert {p.device_type for p in points} == ({"cuda"} if kinds == {"measured"} else {"cpu"})


def test_what_fits_on_the_gpus_is_measured_and_the_rest_emulated() -> None:
    points = points_of(resolved("blog", Machine(num_gpus=4, gpu_name="H800")))
    assert {(p.kind, p.num_devices) for p in points} == {("measured", 4), ("emulated", 8)}


def test_measuring_on_too_few_gpus_says_so_of_every_row() -> None:
    sweep = resolved("blog", Machine(num_gpus=4, gpu_name="H800"), mode="measured")
    assert pool_size(sweep) == 4
    reasons = {p.num_devices: p.impossible for p in points_of(sweep)}
    assert reasons[4] is None
    assert "needs 8 GPUs, and there are 4 here" in reasons[8]


@pytest.mark.parametrize("preset", ["quick", "point"])
def test_gpus_that_are_asked_for_are_what_runs(preset) -> None:
    assert {(p.kind, p.num_devices) for p in points_of(resolved(preset, NODE, gpus=8))} == {("measured", 8)}
    assert {p.kind for p in points_of(resolved(preset, ONE_GPU, gpus=8))} == {"emulated"}
    assert {p.kind for p in points_of(resolved(preset, NO_GPU, gpus=8))} == {"predicted"}
    assert {p.device_type for p in points_of(resolved(preset, NODE, gpus=8, ranks="1"))} == {"cpu", "cuda"}
    assert {p.kind for p in points_of(resolved("quick", NODE))} == {"measured", "predicted"}


@pytest.mark.parametrize(("machine", "mode"), [(NODE, "auto"), (NODE, "measured"), (ONE_GPU, "emulated")], ids=str)
def test_the_longest_length_is_predicted_beside_what_runs(machine, mode) -> None:
    sweep = resolved("h800", machine, mode=mode, strategies="ulysses")
    (search,) = (grid for grid in sweep.targets if grid.search)
    assert (search.kind, target_points(search)) == ("predicted", [])
    assert "predicted" not in {p.kind for p in points_of(sweep)}
    assert len(search.policies) == 3


def test_the_example_of_the_documentation_resolves_everywhere() -> None:
    words = "--seq-lens 64k,256k,819200 --strategies ulysses,fastseq --gpus 8 --target h800 --policy auto"
    for machine in (NO_GPU, ONE_GPU, NODE):
        assert points_of(parse(words.split()).resolve(machine))


def test_measuring_without_gpus_is_the_same_sweep_of_a_small_model() -> None:
    for name in ("blog", "h800", "compare"):
        points = points_of(resolved(name, mode="measured"))
        assert {p.kind for p in points} == {"measured"}
        assert {p.model.hidden_size for p in points} == {64}
        assert {p.strategy for p in points} == {p.strategy for p in points_of(resolved(name))}


def test_on_gpus_the_true_model_runs_in_bf16_behind_a_gate_that_takes_seconds() -> None:
    for point in points_of(resolved("h800", NODE)):
        assert (point.model.depth, point.parallel.precision, point.device_type) == (28, "bf16", "cuda")
        assert (point.gate_depth, point.gate_len) == (2, min(32_768, point.seq_len))
        # As many steps as a verdict takes, however long one is.
        assert point.timing.min_samples >= MIN_DECISIVE


@pytest.mark.parametrize(
    ("options", "machine", "said"),
    [
        ({"mode": "emulated"}, NO_GPU, "there is none here"),
        ({"mode": "measured", "gpus": 8}, NO_GPU, "no GPU here to measure on"),
        ({"mode": "measured"}, ONE_GPU, "4, 8 asked for, 1 here"),
        ({"preset": "headline", "mode": "measured"}, NO_GPU, "headline has nothing to measure without a GPU"),
        ({"mode": "measured", "policies": "auto"}, NO_GPU, "auto goes by the memory of a GPU"),
        ({"peers": "megatron"}, NO_GPU, "deepspeed-ulysses, yunchang-usp"),
        ({"layouts": "mine"}, NO_GPU, "replicated, published"),
        ({"engines": "ddp"}, NO_GPU, "engine 'ddp' has no mixed precision"),
        ({"head_chunks": "0"}, NO_GPU, "head_chunks"),
        ({"conditioning": "cross,adaln"}, NO_GPU, "conditioning: one of"),
        ({"conditioning": "adaln", "regimes": "text_only"}, NO_GPU, "nothing would attend"),
        ({"mode": "measured", "search": True}, NO_GPU, "search: True is predicted"),
        ({"rehearse": True, "search": True}, NO_GPU, "search: True is predicted"),
        ({"search": True, "policies": "auto"}, NO_GPU, "search: takes policies by name"),
        ({"preset": "quick", "conditioning": "adaln"}, NO_GPU, "--regimes full"),
        ({"preset": "h800", "mode": "measured", "regimes": "text_only"}, NO_GPU, "h800 has no text_only points"),
        (
            {"preset": "quick", "mode": "predicted", "model": "dit-s-2", "sp_degrees": "4", "strategies": "ulysses"},
            NO_GPU,
            "strategies: none of ulysses can run with sp_degrees 4: .*num_heads 6",
        ),
        ({"batches": "2", "mode": "measured"}, NO_GPU, "batch_per_group must be 1"),
        ({"wall_cap": 0.0}, NO_GPU, "wall_cap must be positive"),
        ({"min_samples": 5, "max_samples": 2}, NO_GPU, "min_samples <= max_samples"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_is_said_before_anything_runs(options, machine, said) -> None:
    with pytest.raises(ValueError, match=said):
        points_of(resolved("blog", machine, **options))


def test_samples_that_are_asked_for_hold_at_the_longest_length_too() -> None:
    words = "--ranks 1 --strategies local --seq-lens 1k,2k --min-samples 20 --wall-cap 50 --mode measured"
    points = points_of(parse(words.split()).resolve(NO_GPU))
    assert [(p.timing.min_samples, p.timing.wall_cap_s) for p in points] == [(20, 50.0), (20, 50.0)]
    unsaid = points_of(resolved("quick", ranks="1", strategies="local", seq_lens="1k,2k", mode="measured"))
    assert unsaid[-1].timing.max_samples == 2


@pytest.mark.parametrize(
    ("options", "models"),
    [
        ({"preset": "blog", "regimes": "text_only"}, {("text_only", "published"), ("text_only", "replicated")}),
        ({"preset": "blog", "layouts": "Replicated"}, {("text_only", "replicated"), ("full", "replicated")}),
        ({"preset": "point", "regimes": "TEXT_ONLY"}, {("text_only", "replicated")}),
        ({"preset": "point", "layouts": "published,replicated"}, {("full", "published"), ("full", "replicated")}),
        ({"preset": "quick", "regimes": "text_only", "layouts": "published"}, {("text_only", "published")}),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else None,
)
def test_regimes_and_layouts_hold_on_the_cpu(options, models) -> None:
    sweep = SweepConfig(**({"mode": "measured"} | options)).resolve(NO_GPU)
    assert {(p.regime, p.model.cross_layout) for p in points_of(sweep)} == models
    assert len(set(sweep.measured)) == len(sweep.measured)


def test_conditioning_without_attention_to_text_leaves_small_grids_alone() -> None:
    points = points_of(resolved("quick", mode="measured", conditioning="adaln"))
    assert {p.model.conditioning for p in points} == {"adaln"}


def test_any_axis_on_the_command_line() -> None:
    words = (
        "--seq-lens 64k,256k,819200 --strategies ulysses,FastSeq --gpus 8 --target h800 --policy auto --mode predicted"
    )
    points = points_of(parse(words.split()).resolve(NO_GPU))
    assert {p.seq_len for p in points} == {65_536, 262_144, 819_200}
    assert {(p.strategy, p.parallel.policy) for p in points} == {
        ("local", "full"),
        ("ulysses", "auto"),
        ("fastseq", "auto"),
    }
    assert {(p.target, p.num_devices) for p in points} == {("H800", 8)}
    words = (
        "--head-chunks 1,2 --mlp-tile 4k --engine fsdp2-zero3 --strategies ulysses,ring --layout published --batch 2"
    )
    points = points_of(parse([*words.split(), "--mode=predicted", "--no-baseline", "--regimes=full"]).resolve(NO_GPU))
    assert {(p.strategy, p.parallel.head_chunks) for p in points} == {("ulysses", 1), ("ulysses", 2), ("ring", None)}
    assert {(p.parallel.mlp_tile, p.parallel.engine, p.batch_per_group) for p in points} == {(4096, "fsdp2-zero3", 2)}
    assert {p.model.cross_layout for p in points} == {"published"}
