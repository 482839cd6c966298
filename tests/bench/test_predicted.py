"""longreel.bench.predicted: what is predicted, by workers beside each other, and the search for the longest length."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest

from longreel.bench.folder import Records
from longreel.bench.grids import TargetGrid, target_points
from longreel.bench.longest import STEP
from longreel.bench.predicted import Wanted, predicted
from longreel.bench.predictor import HOST_BYTES, Answer, case_of, predict_share, search_share
from longreel.parallel.predict.hardware import get_profile
from longreel.parallel.predict.predict import predict_step
from longreel.parallel.workers import WorkerError, WorkerPool
from longreel.reports.store import load

PROVENANCE = {"commit": "c", "environment": {}}
GRID = TargetGrid(
    regime="full",
    seq_lens=(8_192,),
    strategies=("ulysses",),
    sp_degrees=(2,),
    policies=("full",),
    model_preset="dit-s-2",
    every_policy=True,
)


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2) as pool:
        yield pool


def own_process() -> int:
    """In a worker."""
    return os.getpid()


def test_quick_predictions_leave_out_what_says_nothing_new() -> None:
    grid = TargetGrid(regime="full", seq_lens=(1, 2, 3), strategies=("local", "ulysses"), sp_degrees=(2,))
    wanted = Wanted(every_policy=False)
    ran = {"local": [], "ulysses": []}
    for group in target_points(grid):
        for point in group:
            if wanted(point):
                ran[point.parallel.strategy].append((point.seq_len, point.parallel.policy))
                longest = {"none": 1, "keep_attention": 2, "full": 9}[point.parallel.policy]
                fits = point.seq_len <= longest
                outcome = {"step_s": 1.0} if fits else {"reason": "needs more"}
                wanted.saw(point, point.record("ok" if fits else "oom", provenance=PROVENANCE, **outcome))
    assert ran["ulysses"] == [(1, "none"), (2, "none"), (2, "keep_attention"), (3, "keep_attention"), (3, "full")]
    # The baseline of every ratio, local with recomputation, is predicted at every length.
    assert ran["local"] == [(1, "none"), (1, "full"), *ran["ulysses"][1:3], (2, "full"), *ran["ulysses"][3:]]


def test_a_batch_or_kernel_that_does_not_fit_says_nothing_of_another() -> None:
    grid = TargetGrid(regime="full", seq_lens=(1, 2), strategies=("local",), policies=("full",), batches=(1, 8))
    wanted = Wanted(every_policy=False)
    ((small, large), (small_later, large_later)) = target_points(replace(grid, mlp_tiles=(4096,), baseline=False))
    wanted.saw(large, large.record("oom", reason="needs more", provenance=PROVENANCE))
    assert wanted(small_later)
    assert not wanted(large_later)
    wanted.saw(small, small.record("ok", step_s=1.0, provenance=PROVENANCE))
    assert wanted(replace(small, parallel=replace(small.parallel, policy="none", mlp_tile=None)))
    assert not wanted(replace(small, parallel=replace(small.parallel, policy="none")))


class FakePool:
    """Answers in this process: `none` wherever policy `auto` is asked for, a search by `longest`; the rest fits."""

    def __init__(self, *, chosen="full", longest=None, fails=lambda point: False) -> None:
        self.chosen, self.longest, self.fails, self.calls = chosen, longest, fails, []
        case = replace(target_points(GRID)[0][0], seq_len=512)
        self.prediction = predict_step(case_of(case))

    def run(self, function, world_size, points, *_, timeout):
        self.calls.append(len(points))
        if any(self.fails(point) for point in points):
            raise WorkerError("rank 0 of 1 died")
        if function is search_share:
            found = (self.longest and replace(point, seq_len=self.longest) for point in points)
            return [point and Answer(point=point, prediction=self.prediction) for point in found]
        return [Answer(point=self._settled(point), prediction=self.prediction) for point in points]

    def _settled(self, point):
        if point.parallel.policy != "auto":
            return point
        return replace(point, parallel=replace(point.parallel, policy=self.chosen))


@pytest.mark.parametrize("baseline", [True, False])
def test_policy_auto_leaves_the_baseline_what_it_is(tmp_path, baseline) -> None:
    grid = replace(GRID, strategies=("local",), policies=("auto",), every_policy=False, baseline=baseline)
    records = Records(tmp_path, PROVENANCE, resume=False)
    for record in predicted(grid, FakePool(), PROVENANCE, width=2, done=records.done, saved=records.saved):
        records.add(record)
    # What `auto` became is the same point.
    assert [(r.policy, r.is_baseline) for r in records.all()] == [("full", True)]
    again = Records(tmp_path, PROVENANCE, resume=True)
    asked = FakePool()
    assert list(predicted(grid, asked, PROVENANCE, width=2, done=again.done, saved=again.saved)) == []
    assert asked.calls == []


def test_policy_auto_is_asked_beside_others_that_fit() -> None:
    grid = replace(GRID, policies=("full", "auto"), every_policy=False)
    found = list(predicted(grid, FakePool(chosen="none"), PROVENANCE, width=2))
    assert [(r.strategy, r.policy) for r in found] == [("local", "full"), ("ulysses", "full"), ("ulysses", "none")]


def test_searches_have_rows_of_their_own_and_are_not_asked_again(tmp_path) -> None:
    grid = replace(GRID, search=True)
    for longest in (GRID.seq_lens[0], None):
        records = Records(tmp_path / str(longest), PROVENANCE, resume=False)
        records.path.parent.mkdir()
        for record in predicted(grid, FakePool(longest=longest), PROVENANCE, width=2):
            assert records.add(record)
        searched = [r for r in records.all() if "search" in r.provenance]
        # Of the baseline's length and of ours: a row beside the point's own.
        assert [(r.strategy, r.is_baseline) for r in searched] == [("local", False), ("ulysses", False)]
        assert {r.status for r in searched} == {"ok" if longest else "oom"}
        again = Records(records.path.parent, PROVENANCE, resume=True)
        asked = FakePool(longest=longest)
        assert list(predicted(grid, asked, PROVENANCE, width=2, done=again.done, saved=again.saved)) == []
        assert asked.calls == []


def test_stopped_anywhere_and_resumed_it_has_the_rows_of_an_undisturbed_run(tmp_path) -> None:
    # Lengths, `auto`, policies that say nothing new beside one that fits, and searches.
    grid = replace(GRID, seq_lens=(8_192, 16_384), policies=("none", "full", "auto"), every_policy=False, search=True)
    pool = FakePool(chosen="keep_attention", longest=16_384)

    def run(folder, most: int | None) -> list[str]:
        folder.mkdir(exist_ok=True)
        records = Records(folder, PROVENANCE, resume=True)
        made = predicted(grid, pool, PROVENANCE, width=2, done=records.done, saved=records.saved)
        for record in itertools.islice(made, most):
            records.add(record)
        return [record.key for record in load(records.path)] if records.path.exists() else []

    whole = run(tmp_path / "whole", None)
    assert len(whole) == len(set(whole)) == 9
    for place in range(len(whole)):
        before = run(tmp_path / str(place), place)
        after = run(tmp_path / str(place), None)
        assert (before, sorted(after)) == (after[:place], sorted(whole))


def test_search_that_fails_costs_no_other_and_no_point() -> None:
    pool = FakePool(longest=16_384, fails=lambda point: point.seq_len == 1 and point.strategy == "local")
    found = list(predicted(replace(GRID, search=True), pool, PROVENANCE, width=2))
    searched = {r.strategy: r.status for r in found if "search" in r.provenance}
    assert searched == {"local": "error", "ulysses": "ok"}
    assert len({r.key for r in found}) == len(found)


def test_the_baseline_is_there_whatever_policies_are_asked_for() -> None:
    grid = TargetGrid(regime="full", seq_lens=(1,), sp_degrees=(2,), policies=("none",))
    points = [point for group in target_points(grid) for point in group]
    assert [(p.parallel.strategy, p.parallel.policy) for p in points if p.is_baseline] == [("local", "full")]
    assert {p.parallel.policy for p in points if p.parallel.strategy != "local"} == {"none"}


def test_recomputation_alone_is_predicted_everywhere() -> None:
    grid = TargetGrid(regime="full", seq_lens=(1, 2), strategies=("local",), policies=("full",))
    wanted = Wanted(every_policy=False)
    assert all(wanted(point) for group in target_points(grid) for point in group)


def test_predictions_run_beside_each_other_in_workers(pool) -> None:
    point = next(p for group in target_points(replace(GRID, seq_lens=(512,))) for p in group if not p.is_baseline)
    first, second = pool.run(predict_share, 2, [point, point], timeout=120.0)
    assert first == second
    assert first.prediction.memory_bytes > 0
    # The workers still serve.
    assert len(set(pool.run(own_process, 2, timeout=120.0))) == 2


def test_policy_auto_becomes_the_one_chosen_and_is_not_asked_again(pool) -> None:
    grid = replace(GRID, policies=("auto",), baseline=False)
    ((point,),) = target_points(grid)
    (record,) = predicted(grid, pool, PROVENANCE, width=2)
    # Everything fits: nothing is recomputed.
    assert (record.status, record.policy) == ("ok", "none")
    assert record.config["parallel"]["policy"] == "none"
    assert record.provenance["policy"].startswith("none: fits")
    assert record.provenance["asked"] == {"key": point.key(PROVENANCE), "policy": "auto"}
    assert list(predicted(grid, pool, PROVENANCE, width=2, done={point.key(PROVENANCE)}.__contains__)) == []


def test_policy_auto_where_none_fits_is_out_of_memory(pool) -> None:
    grid = replace(GRID, seq_lens=(2**23,), policies=("auto",), baseline=False)
    (record,) = predicted(grid, pool, PROVENANCE, width=1)
    assert record.status == "oom"
    assert "none fits" in record.reason


@pytest.mark.slow
def test_search_finds_the_length_at_which_one_step_more_does_not_fit(pool) -> None:
    grid = replace(GRID, search=True, policies=("full", "offload"))
    found = list(predicted(grid, pool, PROVENANCE, width=2))
    longest = [record for record in found if "search" in record.provenance]
    # Of the baseline too.
    assert [(r.strategy, r.policy) for r in longest] == [("local", "full"), ("ulysses", "full"), ("ulysses", "offload")]
    usable = get_profile(grid.target).usable_bytes
    points = {(p.strategy, p.parallel.policy): p for group in target_points(grid) for p in group}
    for record in longest:
        assert record.status == "ok"
        assert not record.is_baseline
        assert record.seq_len % STEP == 0
        point = points[record.strategy, record.policy]
        needs = [
            predict_step(case_of(replace(point, seq_len=seq_len)))
            for seq_len in (record.seq_len, record.seq_len + STEP)
        ]
        assert [need.memory_bytes <= usable and need.host_bytes <= HOST_BYTES for need in needs] == [True, False]
    asked = {record.provenance["asked"]["key"] for record in longest} | {record.key for record in found}
    assert list(predicted(grid, pool, PROVENANCE, width=2, done=asked.__contains__)) == []


def test_peers_and_engines_that_nothing_predicts_are_rows_with_the_reason(pool) -> None:
    grid = replace(GRID, sp_degrees=(8,), model_preset="dit-xl-2", peers=("yunchang-usp",), strategies=())
    found = {record.strategy: record for record in predicted(grid, pool, PROVENANCE, width=1)}
    assert found["local"].status == "ok"
    assert found["yunchang-usp"].status == "skipped"
    assert "for real or not at all" in found["yunchang-usp"].reason
    colossalai = replace(GRID, strategies=("local",), engines=("colossalai",), baseline=False)
    (record,) = predicted(colossalai, pool, PROVENANCE, width=1)
    assert (record.engine, record.status) == ("colossalai", "skipped")
