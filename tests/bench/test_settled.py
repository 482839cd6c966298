"""longreel.bench.settled: what runs for real or emulated has a policy with a name by then."""

from __future__ import annotations

from dataclasses import replace

from longreel.bench.grids import MeasuredGrid, measured_points
from longreel.bench.predictor import Answer, _settle, settle_share
from longreel.bench.presets import small_dit
from longreel.bench.settled import settled
from longreel.parallel.workers import WorkerError

GRID = MeasuredGrid(
    seq_lens=(4096,),
    ranks=(2,),
    sp_degrees=(2,),
    strategies=("local", "ulysses"),
    policies=("auto",),
    model=small_dit(),
    precision="bf16",
    device_type="cuda",
)


class FakePool:
    """Answers in this process."""

    def __init__(self, answer) -> None:
        self.answer = answer

    def run(self, function, world_size, points, *, timeout):
        assert (function, world_size, len(points)) == (settle_share, 1, 1)
        return [self.answer(points[0])]


def chosen(point):
    policy = "full" if point.strategy == "local" else "none"
    return Answer(point=replace(point, parallel=replace(point.parallel, policy=policy)), chosen=f"{policy}: fits")


def test_auto_becomes_the_policy_chosen_and_the_baseline_runs_once() -> None:
    points = settled(GRID, measured_points(GRID, device="NVIDIA H800"), FakePool(chosen))
    assert [(p.strategy, p.parallel.policy, p.is_baseline) for p in points] == [
        ("local", "full", True),
        ("ulysses", "none", False),
    ]
    record = points[1].record("ok", step_s=1.0, provenance={"commit": "c"})
    assert record.provenance["policy"] == "none: fits"
    assert record.key == replace(points[1], chosen=None).key({"commit": "c"})


def test_what_cannot_be_settled_is_a_row_with_the_reason() -> None:
    def died(point):
        raise WorkerError("rank 0 of 1 died with exit code 9")

    auto = measured_points(replace(GRID, baseline=False), device="NVIDIA H800")
    for answer, said in (
        (lambda point: Answer(point=point, status="oom", reason="none fits"), "by prediction: none fits"),
        (died, "exit code 9"),
    ):
        for point in settled(GRID, auto, FakePool(answer)):
            assert said in point.impossible


def test_a_gpu_without_a_profile_settles_nothing() -> None:
    (point, *_) = measured_points(replace(GRID, baseline=False), device="A GPU of tomorrow")
    answer = _settle(point)
    assert (answer.status, answer.point) == ("skipped", point)
    assert "none of A GPU of tomorrow" in answer.reason
