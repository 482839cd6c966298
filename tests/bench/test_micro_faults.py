"""What becomes of providers and candidates that hang or raise: a row each, within their limit; the others are kept."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from longreel.bench import micro_attempts, op_run, tune
from longreel.bench.campaign_plans import hopper
from longreel.bench.micro_sweep import MicroPlan, load, run_plan
from longreel.bench.op_run import CaseRequest, run_case
from longreel.bench.ops import OpCase
from longreel.bench.timing import TimingRule
from longreel.bench.tune import TuneResult
from longreel.bench.tune_plans import TunePlan, attention_targets
from longreel.parallel.workers import WorkerPool

ORIGIN = {"commit": "c0ffee", "source": "abc", "environment": {"device": "a CPU"}, "versions": {}, "command": "x"}
RULE = TimingRule(min_samples=2, max_samples=2, budget_s=0.0, wall_cap_s=2.0, warm_up_s=0.0)


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1) as pool:
        yield pool


def case_of(seq_len: int) -> OpCase:
    return OpCase(op="attention", dtype="fp32", seq_len=seq_len, num_heads=1, head_dim=8)


def plan_of(*seq_lens: int, providers: tuple[str, ...] = ("eager", "sdpa-flash", "torch")) -> MicroPlan:
    return MicroPlan(
        cases=tuple(case_of(s) for s in seq_lens),
        providers=providers,
        directions=("forward", "backward"),
        rule=RULE,
        device="cpu",
        setup_s=3.0,
    )


def found_in(file: Path) -> dict[tuple[str, str, int], str]:
    records = load(file)
    assert len({r.key for r in records}) == len(records)
    return {(r.provider, r.direction, r.shape["seq_len"]): r.status for r in records}


def run_case_with(request: CaseRequest, provider: str, misbehave) -> list:
    """In the worker: run_case where the build of one provider does something else."""
    right = op_run.providers.build

    def build(case, name, device):
        return misbehave() if name == provider else right(case, name, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op_run.providers, "build", build)
        return run_case(request)


def hang() -> None:
    while True:
        time.sleep(1)


def run_case_with_hanging_flash(request):
    """In the worker."""
    return run_case_with(request, "sdpa-flash", hang)


def refuse() -> None:
    def function(*_):
        raise RuntimeError("no kernel for this shape")

    return function


def run_case_with_raising_flash(request):
    """In the worker."""
    return run_case_with(request, "sdpa-flash", refuse)


def run_case_cut_after_forward(request):
    """In the worker: the backward does not end."""
    if request.directions[0] == "backward":
        return run_case(request)
    right = op_run._time_direction

    def time_direction(request, direction, *rest):
        return hang() if direction == "backward" else right(request, direction, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op_run, "_time_direction", time_direction)
        return run_case(request)


@pytest.mark.slow
def test_a_provider_that_hangs_is_a_row_and_the_others_are_measured(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(micro_attempts, "run_case", run_case_with_hanging_flash)
    file, not_again = tmp_path / "r.jsonl", {}
    start = time.monotonic()
    options = {"pool": pool, "deadline": start + 120.0, "not_again": not_again, "say": lambda _: None}
    _, left = run_plan(plan_of(16), file, ORIGIN, **options)
    assert not left
    # Its limit is 5 s, spent once.
    assert time.monotonic() - start < 60.0
    rows = found_in(file)
    assert {rows[name, d, 16] for name in ("eager", "torch") for d in ("forward", "backward")} == {"ok"}
    assert {rows["sdpa-flash", d, 16] for d in ("forward", "backward")} == {"error"}
    assert any("within 5 s" in r.reason for r in load(file) if r.status == "error")
    # Another plan does not try it at a longer length.
    run_plan(plan_of(24), file, ORIGIN, **options)
    assert found_in(file)["sdpa-flash", "forward", 24] == "skipped"


def run_case_that_dies_at_the_end(request):
    """In the worker."""
    run_case(request)
    raise RuntimeError("too late to matter")


@pytest.mark.parametrize("op", ["attention", "clone"])
def test_a_worker_that_dies_when_all_is_measured_loses_nothing(tmp_path, pool, monkeypatch, op):
    monkeypatch.setattr(micro_attempts, "run_case", run_case_that_dies_at_the_end)
    plan = plan_of(16, providers=("eager", "torch"))
    plan = replace(plan, cases=tuple(replace(case, op=op) for case in plan.cases))
    run_plan(plan, tmp_path / "r.jsonl", ORIGIN, pool=pool, say=lambda _: None)
    assert set(found_in(tmp_path / "r.jsonl").values()) == {"ok"}


def test_what_failed_at_a_long_length_is_tried_at_a_short_one(tmp_path, pool):
    not_again = {("attention", "sdpa-flash", 8, "fp32"): (32, "failed at seq_len 32: x")}
    file = tmp_path / "r.jsonl"
    run_plan(plan_of(16, 32), file, ORIGIN, pool=pool, not_again=not_again, say=lambda _: None)
    rows = found_in(file)
    assert rows["sdpa-flash", "forward", 16] == "ok"
    assert rows["sdpa-flash", "forward", 32] == "skipped"


def test_a_provider_that_raises_at_the_gate_costs_nobody_else_a_run(monkeypatch):
    request = CaseRequest(
        case=case_of(16),
        providers=("eager", "sdpa-flash"),
        directions=("forward",),
        rule=RULE,
        device="cpu",
        run="now",
        provenance=ORIGIN,
    )
    ok, error = run_case_with_raising_flash(request)
    assert (ok.provider, ok.status) == ("eager", "ok")
    assert (error.status, error.reason) == ("error", "RuntimeError: no kernel for this shape")


@pytest.mark.slow
def test_a_direction_that_was_done_before_the_deadline_is_kept(tmp_path, pool, monkeypatch):
    file = tmp_path / "r.jsonl"
    plan = replace(plan_of(16, providers=("eager", "torch")), setup_s=100.0)
    monkeypatch.setattr(micro_attempts, "run_case", run_case_cut_after_forward)
    options = {"pool": pool, "say": lambda _: None}
    pool.run(time.monotonic, 1)
    made, left = run_plan(plan, file, ORIGIN, deadline=time.monotonic() + 7.0, **options)
    assert [case.seq_len for case in left] == [16]
    assert {(r.provider, r.direction) for r in made} == {("eager", "forward"), ("torch", "forward")}
    _, left = run_plan(plan, file, ORIGIN, **options)
    assert not left
    assert set(found_in(file).values()) == {"ok"}


def test_hopper_runs_after_the_others():
    for plan in hopper((), device="cuda").micro:
        for case in plan.cases:
            names = plan.providers_for(case.op)
            last = tuple(name for name in names if name.startswith("triton-hopper"))
            assert names[len(names) - len(last) :] == last
    assert "triton-hopper" in hopper((), device="cuda").micro[0].providers_for("attention")
    kernels = [target.kernel for target in hopper((), device="cuda").tune.targets]
    assert kernels[-1] == "hopper"
    assert {"forward", "dkdv", "dq", "fused", "adaln_fwd", "gelu_bwd", "merge_bwd"} <= set(kernels)


@pytest.mark.slow
def test_a_candidate_that_hangs_is_an_error_and_the_next_one_runs(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(tune, "run_candidate", run_candidate_that_hangs)
    plan = TunePlan(
        targets=attention_targets(case_of(16), ("forward",)),
        device="cpu",
        rule=RULE,
        final_rule=RULE,
        most=2,
        setup_s=0.5,
    )
    plan = replace(plan, rule=replace(RULE, wall_cap_s=0.5))
    file = tmp_path / "r.jsonl"
    deadline = time.monotonic() + 100.0
    tune.tune(plan, file, ORIGIN, pool=pool, run="now", deadline=deadline, result=TuneResult(), say=lambda _: None)
    assert [r.status for r in load(file)] == ["error", "error"]


def run_candidate_that_hangs(request):
    """In the worker."""
    hang()


@pytest.mark.parametrize("outcome", ["ok", "wrong", "error"])
def test_a_decision_that_could_not_be_timed_is_not_marked_measured(tmp_path, pool, monkeypatch, outcome):
    monkeypatch.setattr(tune, "run_candidate", {"ok": decided, "wrong": decided_wrong, "error": decided_error}[outcome])
    plan = TunePlan(targets=attention_targets(case_of(16), ("forward",)), device="cpu", rule=RULE, final_rule=RULE)
    plan = replace(plan, most=1, setup_s=60.0)
    options = {"pool": pool, "run": "now", "deadline": time.monotonic() + 100.0, "result": TuneResult()}
    (entry,) = tune.tune(plan, tmp_path / "r.jsonl", ORIGIN, say=lambda _: None, **options).entries
    assert [row["status"] for row in entry["tried"]] == ["ok", outcome]
    if outcome == "ok":
        assert entry["chosen"]["evidence"] == "measured"
        assert entry["chosen"]["record"] == entry["tried"][-1]["record"]
    else:
        assert entry["chosen"] == entry["current"]
        assert entry["verdict"].startswith(f"not decided: {outcome}: ")


def decided(request, outcome="ok"):
    """In the worker: the search times its candidate as faster; the decision has this outcome."""
    base = request.base
    if base.label.startswith("tuned") and outcome != "ok":
        return base.record(request.provider, request.direction, outcome, reason="by intent")
    comparison = {"provider": "constants in use", "verdict": "FAST", "ratio": 0.5, "low": 0.4, "high": 0.6}
    return base.record(request.provider, request.direction, "ok", median_s=1.0, comparison=comparison)


def decided_wrong(request):
    """In the worker."""
    return decided(request, "wrong")


def decided_error(request):
    """In the worker."""
    return decided(request, "error")
