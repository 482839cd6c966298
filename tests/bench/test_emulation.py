"""longreel.bench.emulation and emulated_run: points on a worker, what stops them early, and sweeps that go on."""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longreel.bench import emulated_run, emulation, sweep
from longreel.bench.cases import Point
from longreel.bench.emulated_plans import Estimates
from longreel.bench.emulated_result import DepthRun, Emulated, Plan
from longreel.bench.emulated_run import Emulator, emulated
from longreel.bench.emulation import allocator_cap, cannot_emulate, emulate_point
from longreel.bench.grids import TargetGrid, target_points
from longreel.bench.predictor import Answer
from longreel.models.config import DiTConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.predict.hardware import FIXED_RESERVE_BYTES
from longreel.parallel.workers import WorkerPool, WorkerTimeout
from longreel.reports import store
from longreel.reports.records import Record

MODEL = DiTConfig(depth=3, hidden_size=64, num_heads=8, conditioning="cross", text_dim=16, max_text_tokens=8)
POINT = Point(
    kind="emulated",
    model=MODEL,
    model_name="a small DiT",
    parallel=ParallelConfig(strategy="ulysses", sp_degree=4, policy="full", attention_provider="sdpa-flash"),
    num_devices=8,
    device="H800 (one rank on this CPU)",
    target="H800",
    seq_len=64,
)
PLAN = Plan(depths=(1, 2, 3), samples=2)
PROVENANCE: dict[str, Any] = {"commit": "0" * 40, "environment": {"cores": 2}}


@pytest.mark.parametrize(
    "plan", [PLAN, pytest.param(replace(PLAN, memory_share=0.95), marks=pytest.mark.slow)], ids=["roomy", "doubtful"]
)
def test_every_depth_is_timed_and_looked_at(run_distributed: Callable[..., list[Any]], plan: Plan) -> None:
    (found,) = run_distributed(emulate_point, 1, POINT, plan, "cpu")
    assert (found.oom, found.wrong, found.unfinished) == (None, None, None)
    assert [(run.depth, len(run.samples_s)) for run in found.runs] == [(1, 2), (2, 2), (3, 1)]
    # Calls are linear in depth: the blocks' and the root's.
    one, two, three = (run.calls["sharding.reduce_scatter"]["calls"] for run in found.runs)
    assert (two - one, three - two) == (1, 1)
    sent = [run.calls["sequence.all_to_all"]["bytes"] for run in found.runs]
    # Full recomputation: q, k, v and o go three times, 4 M (P - 1) / P^2 each.
    assert sent == [3 * 4 * 64 * 64 * 4 * 3 // 16 * depth for depth in (1, 2, 3)]
    assert found.cap_bytes is None and found.runs[0].memory["process"] > 0


def test_a_deadline_leaves_a_point_unfinished(run_distributed: Callable[..., list[Any]]) -> None:
    (found,) = run_distributed(emulate_point, 1, POINT, PLAN, "cpu", time.monotonic() - 1)
    assert found.unfinished == "no time left for another step at depth 1"


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"strategy": "fastseq", "exchange": "symmetric"},
            "symmetric' cannot be emulated: it reads the memory of peers",
        ),
        ({"engine": "ddp"}, "engine 'ddp' cannot be emulated; use fsdp2-zero2 or fsdp2-zero3"),
        ({"engine": "colossalai"}, "engine 'colossalai' cannot be emulated"),
    ],
)
def test_what_cannot_be_emulated_says_so(fields: dict[str, Any], match: str) -> None:
    point = replace(POINT, parallel=ParallelConfig(**({"strategy": "ulysses", "sp_degree": 4} | fields)))
    reason = cannot_emulate(point)
    assert reason is not None and match in reason
    with pytest.raises(ValueError, match="cannot be emulated"):
        emulate_point(point, PLAN, "cpu")
    assert cannot_emulate(POINT) is None


def poisoned(point: Point, plan: Plan, where: str) -> Emulated:
    """In a worker: a point whose weights or loss are not finite."""
    build = emulation.gate.build_model

    def broken(config: DiTConfig, seed: int) -> Any:
        model = build(config, seed)
        with torch.no_grad():
            next(model.blocks.parameters()).view(-1)[0] = float(where)
        return model

    emulation.gate.build_model = broken
    try:
        return emulate_point(point, plan, "cpu")
    finally:
        emulation.gate.build_model = build


@pytest.mark.parametrize("where", ["nan", "inf"])
def test_numbers_that_are_not_finite_are_found(where: str, run_distributed: Callable[..., list[Any]]) -> None:
    (found,) = run_distributed(poisoned, 1, POINT, PLAN, where)
    assert found.wrong is not None and found.wrong.startswith("not finite at depth 1")


class Pool:
    """Answers as a worker would. outcomes: results or exceptions, in order."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.points: list[tuple[Point, Plan]] = []

    def run(self, fn: Any, world_size: int, *args: Any, timeout: float) -> list[Any]:
        self.points.append(args[:2])
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return [outcome]


def emulator(**fields: Any) -> tuple[Emulator, list[str]]:
    said: list[str] = []
    return Emulator(device="cpu", name="a GPU", say=said.append, **fields), said


def grid(**axes: Any) -> TargetGrid:
    given = {"regime": "full", "seq_lens": (614_400, 65_536), "strategies": ("ulysses",), "sp_degrees": (8,)}
    given |= {"kind": "emulated", "policies": ("keep_attention",), "baseline": False, "attentions": ("sdpa-flash",)}
    return TargetGrid(**(given | axes))


def found(**fields: Any) -> Emulated:
    runs = tuple(
        DepthRun(
            depth=depth,
            samples_s=[float(depth)] * 2,
            phases_s=[{"forward": 0.3, "backward": 0.6, "optimizer": 0.1}] * 2,
            waited_s=[{}] * 2,
            memory={"allocated": depth, "reserved": depth, "device": depth},
        )
        for depth in (1, 2)
    )
    given = {"hw_flops": 1.0, "cap_bytes": 10**9, "link": "", "warm_up": "", "memory_source": "", "runs": runs}
    return Emulated(**(given | fields))


def records(pool: Pool, grid_: TargetGrid, on: Emulator, **more: Any) -> list[Record]:
    return list(emulated(grid_, pool, PROVENANCE, on, Estimates(), **more))  # type: ignore[arg-type]


def test_points_that_time_is_too_short_for_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    # However long the prediction of their memory takes here.
    monkeypatch.setattr(emulated_run, "time", types.SimpleNamespace(monotonic=lambda: 100.0))
    # About 24 s of the long one by its estimate, and 11 of the short one.
    on, said = emulator(deadline=118.0)
    pool = Pool(found())
    made = records(pool, grid(), on)
    assert [record.seq_len for record in made] == [65_536]
    assert len(said) == 1 and said[0].startswith("left for the next run of this command: 614,400 ulysses SP 8 keep_att")


def test_points_that_the_deadline_ends_are_left_and_others_failed() -> None:
    on, said = emulator(deadline=time.monotonic() + 100)
    late = Pool(found(unfinished="no time left"), WorkerTimeout("ended"))
    assert [record.status for record in records(late, grid(), on)] == ["error"]
    assert len(said) == 1
    on, said = emulator()
    assert [r.status for r in records(Pool(WorkerTimeout("ended"), found()), grid(), on)] == ["error", "ok"]


def test_policy_auto_is_settled_before_a_point_runs() -> None:
    auto = grid(seq_lens=(65_536,), policies=("auto",))
    ((asked,),) = target_points(auto)
    answer = Answer(point=replace(asked, parallel=replace(asked.parallel, policy="none")), chosen="none: fits")
    pool = Pool(answer, found())
    (made,) = records(pool, auto, emulator()[0])
    assert (made.status, made.policy, made.provenance["policy"]) == ("ok", "none", "none: fits")
    assert pool.points[1][0].parallel.policy == "none"
    # Over is over: nothing is predicted after the deadline either.
    on, said = emulator(deadline=time.monotonic() - 1)
    assert records(Pool(), auto, on) == []
    assert "left for the next run" in said[0]


def test_a_policy_that_did_not_fit_is_not_tried_at_longer_lengths() -> None:
    on, _ = emulator()
    pool = Pool(found(oom="needs more"), found(), found())
    wanted = grid(seq_lens=(65_536, 262_144), policies=("none", "full"))
    made = records(pool, wanted, on)
    assert [(r.seq_len, r.policy, r.status) for r in made] == [
        (65_536, "none", "oom"),
        (65_536, "full", "ok"),
        (262_144, "full", "ok"),
    ]


def test_done_points_are_not_run_again() -> None:
    on, _ = emulator()
    first = records(Pool(found(), found()), grid(), on)
    known = {record.key: record for record in first}
    assert records(Pool(), grid(), on, done=known.__contains__, saved=known.get) == []


@pytest.mark.slow
def test_a_rehearsed_sweep_goes_the_whole_way_and_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--preset", "headline", "--rehearse", "--out", str(tmp_path)]
    command += ["--seq-lens", "65536", "--strategies", "ulysses", "--sp-degrees", "8", "--policies", "keep_attention"]
    assert sweep.main(command) == 0
    made = store.load(tmp_path / "records.jsonl")
    assert {record.kind for record in made} == {"emulated"}
    assert {(record.strategy, record.status) for record in made} == {("local", "ok"), ("ulysses", "ok")}
    assert all("rehearsal" in record.model and record.seq_len == 64 for record in made)
    assert "EMULATED" in capsys.readouterr().out
    assert sweep.main(command) == 0
    assert len(store.load(tmp_path / "records.jsonl")) == len(made)
    assert "EMULATED" in (tmp_path / "report.html").read_text()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_it_says_what_works(no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--preset", "headline", "--mode", "emulated", "--out", str(tmp_path)]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert sweep.main(["--rehearse", "--mode", "predicted", "--out", str(tmp_path)]) == 2
    assert "rehearse is a rehearsal of mode emulated" in capsys.readouterr().err


def test_pool_is_the_workers(worker_pool: WorkerPool) -> None:
    """What Pool stands for above takes the same arguments."""
    (made,) = worker_pool.run(emulate_point, 1, POINT, Plan(depths=(3,), samples=1), "cpu", None, timeout=60.0)
    assert [run.depth for run in made.runs] == [3]


def test_a_model_that_does_not_fit_is_told_by_two_depths() -> None:
    rank = emulation._Rank(replace(POINT, model=replace(MODEL, depth=28)), PLAN, torch.device("cpu"), None)
    rank.runs = {depth: DepthRun(depth=depth, memory={"allocated": depth * 2**30}) for depth in (1, 2)}
    rank.cap = 28 * 2**30
    rank._stop_if_too_large()
    rank.cap -= 1
    with pytest.raises(emulation._Stop, match=r"needs 28.0 GiB at depth 28 .* more than the 28.0 GiB that H800 leaves"):
        rank._stop_if_too_large()


def test_the_allocator_gets_the_targets_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    memory = types.SimpleNamespace(total_memory=141 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: memory)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "a GPU")
    assert allocator_cap("H800", device) == 80 * 2**30 - FIXED_RESERVE_BYTES
    # What a data sheet calls 80 GB, as drivers show it.
    memory.total_memory = int(79.1 * 2**30)
    assert allocator_cap("H100", device) == 80 * 2**30 - FIXED_RESERVE_BYTES
    with pytest.raises(ValueError, match="target B200 has 180 GiB, more than the 79 GiB of a GPU"):
        allocator_cap("B200", device)
    assert allocator_cap("H800", torch.device("cpu")) is None
