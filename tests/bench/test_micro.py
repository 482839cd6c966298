"""python bench/micro.py on a CPU, tiny: records, resume, rows for what fails, the command line."""

from __future__ import annotations

import csv
import time
from dataclasses import replace

import pytest

from longreel.bench import micro, micro_attempts
from longreel.bench.micro import main
from longreel.bench.micro_options import HOPPER, MicroConfig, parse_range
from longreel.bench.micro_sweep import MicroPlan, load, run_plan
from longreel.bench.ops import OPS, OpCase
from longreel.bench.provenance import source_hash
from longreel.bench.timing import TimingRule
from longreel.parallel.workers import WorkerPool

TINY = ["--preset=smoke", "--seq-lens=32", "--head-dims=8", "--ops=attention,gated_residual", "--min-samples=2"]
ORIGIN = {"commit": "c0ffee", "source": "abc", "environment": {"device": "a CPU"}, "versions": {}, "command": "x"}


@pytest.fixture(autouse=True)
def _same_origin(monkeypatch):
    """Records of one test are of one source, whatever is edited meanwhile."""
    monkeypatch.setattr(micro.op_provenance, "gather", lambda *_, **__: dict(ORIGIN))


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1) as pool:
        yield pool


def tiny_plan(*cases: OpCase, **changes: object) -> MicroPlan:
    values = {
        "cases": cases,
        "providers": ("eager", "sdpa-flash", "triton"),
        "directions": ("forward", "backward"),
        "rule": TimingRule(min_samples=2, max_samples=2, budget_s=0.0, wall_cap_s=20.0, warm_up_s=0.0),
        "device": "cpu",
    }
    return MicroPlan(**(values | changes))


def tiny_case(op: str = "attention", seq_len: int = 16, **changes: object) -> OpCase:
    return OpCase(**({"op": op, "dtype": "fp32", "seq_len": seq_len, "num_heads": 2, "head_dim": 8} | changes))


def test_writes_records_csv_and_report(tmp_path, capsys):
    assert main([*TINY, f"--out={tmp_path}"]) == 0
    records = load(tmp_path / "records.jsonl")
    assert {r.op for r in records} == {"matmul", "clone", "attention", "gated_residual"}
    for r in records:
        assert r.kind == "measured"
        if r.provider == "triton":
            assert r.status == "skipped"
            assert "needs a CUDA device" in r.reason
        else:
            assert r.status == "ok", r.reason
            assert len(r.samples_s) >= 2
            assert all(r.error[name] <= r.allowed[name] for name in r.error)
            assert r.readings == {"unavailable": "no NVML for device type cpu"}
    attention = [r for r in records if r.op == "attention"]
    assert {r.direction for r in attention} == {"forward", "backward", "both"}
    by_direction = {r.direction: set(r.error) for r in attention if r.status == "ok"}
    assert by_direction == {
        "forward": {"out"},
        "backward": {"dq", "dk", "dv"},
        "both": {"out", "dq", "dk", "dv"},
    }
    rows = list(csv.DictReader((tmp_path / "ops.csv").read_text().splitlines()))
    assert [row["key"] for row in rows] == [r.key for r in records]
    ok = [row for row in rows if row["op"] == "attention" and row["status"] == "ok"]
    assert all(float(row["roofline_fraction"]) > 0 for row in ok)
    assert max(float(row["speedup"]) for row in ok) == 1.0
    assert "report.html" in capsys.readouterr().out

    # The same command finds everything done; another length is added.
    assert main([*TINY, f"--out={tmp_path}"]) == 0
    assert load(tmp_path / "records.jsonl") == records
    longer = [word.replace("=32", "=32,48") for word in TINY]
    assert main([*longer, "--providers=eager", "--ops=gated_residual", f"--out={tmp_path}"]) == 0
    added = load(tmp_path / "records.jsonl")[len(records) :]
    assert {(r.op, r.shape["seq_len"]) for r in added} == {("gated_residual", 48)}


@pytest.mark.slow
def test_a_worker_that_fails_costs_only_the_provider_at_fault(tmp_path, pool, monkeypatch):
    case = tiny_case("gated_residual")
    plan = tiny_plan(case, tiny_case("gated_residual", seq_len=24), providers=("eager", "torch", "broken"))
    monkeypatch.setattr(micro_attempts, "run_case", run_case_with_a_broken_provider)
    monkeypatch.setattr(MicroPlan, "providers_for", lambda self, op: self.providers)
    run_plan(plan, tmp_path / "r.jsonl", ORIGIN, pool=pool, say=lambda _: None)
    records = load(tmp_path / "r.jsonl")
    found = {(r.provider, r.shape["seq_len"]): (r.status, r.reason) for r in records}
    assert found["eager", 16][0] == found["torch", 16][0] == found["eager", 24][0] == "ok"
    # What could run was timed together again, and each point is there once.
    assert len({r.key for r in records}) == len(records)
    assert {r.provenance["together"] for r in records if r.status == "ok"} == {"eager torch"}
    status, reason = found["broken", 16]
    assert status == "error"
    assert "RuntimeError: broken by intent" in reason
    # It is not tried at every further length.
    status, reason = found["broken", 24]
    assert status == "skipped"
    assert reason.startswith("failed at seq_len 16: ")


def run_case_with_a_broken_provider(request):
    """In the worker: run_case where the provider `broken` raises."""
    from longreel.bench import op_run

    if "broken" in request.providers and "broken" not in request.not_again:
        raise RuntimeError("broken by intent")
    sound = " ".join(name for name in request.providers if name != "broken")
    return op_run.run_case(replace(request, provenance={**request.provenance, "together": sound}))


def test_wrong_results_are_rows_and_not_timed(tmp_path, pool, monkeypatch):
    plan = tiny_plan(tiny_case("bias_gelu"), providers=("eager",))
    monkeypatch.setattr(micro_attempts, "run_case", run_case_of_a_wrong_kernel)
    run_plan(plan, tmp_path / "r.jsonl", ORIGIN, pool=pool, say=lambda _: None)
    for record in load(tmp_path / "r.jsonl"):
        assert record.status == "wrong", record.reason
        assert "is off by" in record.reason
        assert not record.samples_s
        assert record.error["out"] > record.allowed["out"]


def run_case_of_a_wrong_kernel(request):
    """In the worker: run_case where eager's GELU is 1 % too large."""
    from longreel.bench import op_run, providers

    right = providers.build

    def build(*arguments):
        function = right(*arguments)
        return lambda *inputs: tuple(1.01 * out for out in function(*inputs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(providers, "build", build)
        return op_run.run_case(request)


def test_the_deadline_leaves_cases_for_the_next_run(tmp_path, pool):
    cases = (tiny_case("clone"), tiny_case("clone", seq_len=32))
    made, left = run_plan(tiny_plan(*cases), tmp_path / "r.jsonl", ORIGIN, pool=pool, deadline=0.0, say=lambda _: None)
    assert (made, left) == ([], list(cases))


def test_a_case_cut_by_the_deadline_is_left_and_is_no_failure(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(micro_attempts, "run_case", run_case_forever)
    monkeypatch.setattr(micro_attempts, "LEAST_S", 0.1)
    cases = (tiny_case("clone"), tiny_case("attention"))
    deadline = time.monotonic() + 1.0
    made, left = run_plan(
        tiny_plan(*cases), tmp_path / "r.jsonl", ORIGIN, pool=pool, deadline=deadline, say=lambda _: None
    )
    assert (made, left) == ([], list(cases))
    assert not (tmp_path / "r.jsonl").exists()


def run_case_forever(request):
    """In the worker: a case that does not end."""
    time.sleep(600)


def test_hopper_preset_covers_what_is_asked_for():
    assert set(HOPPER.ops) == set(OPS) - {"clone", "matmul"}
    assert HOPPER.seq_lens[0] == 4096
    assert HOPPER.seq_lens[-1] == 819_200
    assert HOPPER.head_dims == (72, 64, 128)
    assert HOPPER.rooflines("bf16")[0].shape() == {"batch": 1, "seq_len": 8192, "hidden_size": 8192}


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("4k", (4096,)), ("1k..6000", (1024, 2048, 4096, 6000)), ("8,2k..4k", (8, 2048, 4096)), ("64..64", (64,))],
)
def test_ranges_of_lengths(text, lengths):
    assert parse_range("seq_lens", text) == lengths


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops=attention,softmax"], "ops: unknown 'softmax'; there are attention,"),
        (["--providers=cutlass"], "providers: unknown 'cutlass'"),
        (["--directions=up"], "directions: unknown 'up'; there are forward, backward, both"),
        (["--seq-lens=8k..4k"], "seq_lens: '8k..4k' is not a range; write 4k..819200"),
        (["--head-dims=72,20"], "head_dims: '72,20' must be multiples of 8 up to 128"),
        (["--dtypes=fp8"], "dtypes: unknown 'fp8'; there are bf16, fp16, fp32"),
        (["--minutes=0"], "minutes must be positive, got 0.0"),
        (["--num-heads=0"], "num_heads must be at least 1, got 0"),
        (["--device=xpu"], "device must be cpu, cuda or cuda:<index>, got 'xpu'"),
        (["--case-seconds=0"], "case_seconds must be positive, got 0.0"),
        (["--preset=ampere"], "unknown preset 'ampere'; there are auto, smoke, hopper"),
        (["--tiles=/nowhere/tuning.json"], "/nowhere/tuning.json"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    assert main(["--preset=smoke", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_hopper_preset_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--preset=hopper"]) == 2
    assert "there is no CUDA device here; use --preset smoke" in capsys.readouterr().err
    assert MicroConfig().preset_name == "smoke"


def test_source_hash_follows_the_code(tmp_path, monkeypatch):
    for folder in ("kernels", "bench"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    monkeypatch.setattr("longreel.bench.provenance._REPOSITORY", tmp_path)
    first = source_hash(("kernels", "bench"))
    assert source_hash(("kernels", "bench")) == first
    (tmp_path / "kernels" / "a.py").write_text("x = 2\n")
    assert source_hash(("kernels", "bench")) != first


def raising_case(request):
    """In the worker: sdpa-flash raises; run_case else."""
    from longreel.bench import op_run, providers

    right = providers.build

    def refuse(*_):
        raise RuntimeError("no kernel for this shape")

    def build(case, name, device):
        return refuse if name == "sdpa-flash" else right(case, name, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(providers, "build", build)
        return op_run.run_case(request)


def test_what_failed_is_not_tried_again_unless_asked(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(micro_attempts, "run_case", raising_case)
    file = tmp_path / "r.jsonl"
    short, long = tiny_case(), tiny_case(seq_len=24)
    providers = {"providers": ("eager", "sdpa-flash")}
    run = {"pool": pool, "say": lambda _: None}
    made, _ = run_plan(tiny_plan(short, **providers), file, ORIGIN, **run)
    assert {(r.provider, r.status) for r in made} == {("eager", "ok"), ("sdpa-flash", "error")}
    assert run_plan(tiny_plan(short, **providers), file, ORIGIN, **run)[0] == []
    # Another invocation knows that it failed at a shorter length.
    made, _ = run_plan(tiny_plan(short, long, **providers), file, ORIGIN, **run)
    assert {(r.provider, r.status, r.shape["seq_len"]) for r in made} == {
        ("eager", "ok", 24),
        ("sdpa-flash", "skipped", 24),
    }
    monkeypatch.undo()
    made, _ = run_plan(tiny_plan(short, long, **providers), file, ORIGIN, retry_errors=True, **run)
    assert {(r.provider, r.status) for r in made} == {("eager", "ok"), ("sdpa-flash", "ok")}
    assert {r.shape["seq_len"] for r in made} == {16, 24}
    assert run_plan(tiny_plan(short, long, **providers), file, ORIGIN, retry_errors=True, **run)[0] == []


def test_a_peer_without_time_is_a_row_and_measured_once_there_is_time(tmp_path, pool):
    file = tmp_path / "r.jsonl"
    plan = tiny_plan(tiny_case(), providers=("eager", "sdpa-flash", "torch"))
    run_plan(plan, file, ORIGIN, pool=pool, say=lambda _: None)
    longer = replace(plan, cases=(tiny_case(seq_len=64),), case_s=1e-9)
    made, left = run_plan(longer, file, ORIGIN, pool=pool, say=lambda _: None)
    assert not left
    # The fastest is kept.
    skipped = {r.provider for r in made if r.status == "skipped"}
    assert len(skipped) == 2
    assert all("left out: one forward and backward would take" in r.reason for r in made if r.status == "skipped")
    assert {r.provider for r in made if r.status == "ok"} == {"eager", "sdpa-flash", "torch"} - skipped
    assert {len(r.samples_s) for r in made if r.status == "ok"} == {2}
    assert run_plan(longer, file, ORIGIN, pool=pool, say=lambda _: None)[0] == []
    made, _ = run_plan(replace(longer, case_s=60.0), file, ORIGIN, pool=pool, say=lambda _: None)
    assert {r.status for r in made} == {"ok"}
    assert {r.provider for r in made} == {"eager", "sdpa-flash", "torch"}


def test_a_case_that_would_outlast_the_deadline_is_not_started(tmp_path, pool, monkeypatch):
    file = tmp_path / "r.jsonl"
    run_plan(tiny_plan(tiny_case()), file, ORIGIN, pool=pool, say=lambda _: None)
    # By the rate at 16 tokens these take hours, the shorter one does not.
    cases = tiny_case(seq_len=2_000_000), tiny_case(seq_len=20)
    monkeypatch.setattr(micro_attempts, "run_case", run_case_forever_when_long)
    said = []
    deadline = time.monotonic() + 60.0
    made, left = run_plan(tiny_plan(*cases), file, ORIGIN, pool=pool, deadline=deadline, say=said.append)
    assert left == [cases[0]]
    assert {r.shape["seq_len"] for r in made} == {20}
    assert "left for the next run; it would take" in said[0]


def run_case_forever_when_long(request):
    """In the worker."""
    from longreel.bench import op_run

    return op_run.run_case(request) if request.case.seq_len < 100 else time.sleep(600)
