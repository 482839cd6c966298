"""longreel.bench.emulated_record: figures continued in depth, and what becomes of points without any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from longreel.bench.cases import Point
from longreel.bench.emulated_record import block_s, emulated_record
from longreel.bench.emulated_result import DepthRun, Emulated, Plan
from longreel.models.config import dit_xl_2
from longreel.parallel.config import ParallelConfig
from longreel.parallel.predict.flops import useful_flops
from longreel.reports.records import Record

POINT = Point(
    kind="emulated",
    model=dit_xl_2(conditioning="cross"),
    model_name="DiT-XL/2",
    parallel=ParallelConfig(strategy="ulysses", sp_degree=8, policy="keep_attention", precision="bf16"),
    num_devices=8,
    device="H800 (one rank on a GPU)",
    target="H800",
    seq_len=614_400,
)
PLAN = Plan(depths=(1, 2), samples=2)
PROVENANCE: dict[str, Any] = {"commit": "0" * 40, "environment": {}}


def run(depth: int, *samples: float, allocated: int = 0) -> DepthRun:
    """sequence: a block exchanges 1 s, of which a fifth is waited for; sharding: 0.25 s a block and 0.25 s besides."""
    link = 0.25 * (depth + 1)
    return DepthRun(
        depth=depth,
        telemetry={"depth": depth},
        energy_j=[100.0 * depth + 10.0],
        samples_s=list(samples),
        phases_s=[{"forward": 0.3 * s, "backward": 0.6 * s, "optimizer": 0.1 * s} for s in samples],
        waited_s=[{"sequence": 0.2 * depth} for _ in samples],
        memory={"allocated": allocated or 10 * depth + 5, "reserved": 20 * depth, "device": 20 * depth + 7},
        calls={
            "sequence.all_to_all": {"calls": 8 * depth, "bytes": 100 * depth, "link_s": 1.0 * depth},
            "sharding.all_gather": {"calls": 1 + depth, "bytes": 7 + depth, "link_s": link},
        },
        forward_link_s=link,
        longest_link_s=0.25,
    )


def found(*runs: DepthRun, **fields: Any) -> Emulated:
    given = {"hw_flops": 1e15, "cap_bytes": 2**36, "link": "a link", "warm_up": "1 step", "memory_source": "peaks"}
    return Emulated(runs=runs, **(given | fields))


def record(*runs: DepthRun, plan: Plan = PLAN, **fields: Any) -> Record:
    made = emulated_record(POINT, plan, found(*runs, **fields), PROVENANCE)
    assert made is not None
    return made


def test_depths_1_and_2_are_continued_to_the_models() -> None:
    r = record(run(1, 5.0, 5.2), run(2, 9.0, 9.4))
    assert (r.kind, r.status) == ("emulated", "ok")
    assert r.samples_s == pytest.approx((5.0 + 27 * 4.0, 5.2 + 27 * 4.2))
    assert r.step_s == pytest.approx((113.0 + 118.6) / 2)
    # The least that both depths allow for a block is 9.0 - 5.2, the most 9.4 - 5.0.
    assert r.interval_s == pytest.approx((5.0 + 27 * 3.8, 5.2 + 27 * 4.4))
    assert r.memory == {"allocated": 285, "reserved": 560, "device": 567}
    assert r.memory_usable == 2**36 and r.memory_limit == 80 * 2**30
    assert r.traffic == {"sequence.all_to_all": 2800, "sharding.all_gather": 35}
    # A fifth of the exchange is waited for, and of sharding all but the longest collective hides.
    assert r.breakdown["sequence"] == pytest.approx(28 * 0.2) and r.hidden["sequence"] == pytest.approx(28 * 0.8)
    assert r.breakdown["sharding"] == pytest.approx(0.25) and r.hidden["sharding"] == pytest.approx(28 * 0.25)
    assert sum(r.breakdown.values()) == pytest.approx(r.step_s)
    assert r.hw_flops == 8e15
    assert r.flops == useful_flops(POINT.model, num_video=614_400)
    assert r.telemetry == {"depth": 2}
    assert r.hfu == pytest.approx(8e15 / (8 * 989e12 * r.step_s))
    told = r.provenance["emulation"]
    assert told["step_s"] == "continued from depths 1 and 2 to 28" and "linearity" not in told
    assert told["depths"]["2"]["samples_s"] == [9.0, 9.4]


def test_the_whole_depth_counts_where_it_was_timed() -> None:
    r = record(run(1, 5.0, 5.0), run(2, 9.0, 9.0), run(28, 112.0, 114.0), plan=replace(PLAN, depths=(1, 2, 28)))
    assert r.samples_s == (112.0, 114.0) and r.step_s == 113.0
    assert r.memory["allocated"] == 285
    assert r.interval_s == (112.0, 114.0)
    # What the depth itself did, not what depths 1 and 2 would make of it.
    assert r.traffic == {"sequence.all_to_all": 2800, "sharding.all_gather": 35}
    assert r.energy_j == 8 * 2810.0
    told = r.provenance["emulation"]
    assert told["step_s"] == "timed at the model's depth"
    assert told["linearity"] == pytest.approx(
        {"depth": 28.0, "step_s": 1.0, "allocated": 1.0, "reserved": 1.0, "device": 1.0}
    )


def test_energy_is_continued_to_the_models_depth_over_all_devices() -> None:
    assert record(run(1, 5.0, 5.2), run(2, 9.0, 9.4)).energy_j == pytest.approx(8 * 2810.0)
    bare = [replace(one, energy_j=[]) for one in (run(1, 5.0), run(2, 9.0))]
    assert record(*bare).energy_j is None


def test_flops_count_every_sample_of_the_step() -> None:
    parallel = replace(POINT.parallel, sp_degree=2)
    point = replace(POINT, parallel=parallel, batch_per_group=3)
    made = emulated_record(point, PLAN, found(run(1, 5.0), run(2, 9.0)), PROVENANCE)
    assert made is not None
    assert made.flops == 4 * 3 * useful_flops(POINT.model, num_video=614_400)


def test_sharding_that_outlasts_its_phase_is_exposed() -> None:
    """Of 20 s of links in a forward of 3 s all but the longest, 2 s, hides behind it: 2 + 18 - 3 count."""
    calls = {"sharding.all_gather": {"calls": 1, "bytes": 1, "link_s": 20.0}}
    runs = [replace(run(depth, 10.0), forward_link_s=20.0, longest_link_s=2.0, calls=calls) for depth in (1, 2)]
    r = record(*runs)
    assert r.breakdown["sharding"] == pytest.approx(2.0 + 18.0 - 3.0)
    assert r.hidden["sharding"] == pytest.approx(3.0)


def test_one_whole_step_gives_memory_and_shows_the_line() -> None:
    r = record(run(1, 5.0, 5.0), run(2, 9.0, 9.0), run(28, 100.0, allocated=300), plan=replace(PLAN, depths=(1, 2, 28)))
    assert r.step_s == 113.0 and r.memory["allocated"] == 300
    assert r.provenance["emulation"]["linearity"]["step_s"] == pytest.approx(1.13)
    assert r.provenance["emulation"]["linearity"]["allocated"] == pytest.approx(0.95)


def test_points_without_figures_say_why_or_wait_for_the_next_run() -> None:
    oom = record(run(1, 5.0), run(2, 9.0), oom="needs 90 GiB")
    assert (oom.status, oom.reason, oom.memory["allocated"]) == ("oom", "needs 90 GiB", 285)
    early = record(oom="OutOfMemoryError: ...")
    assert (early.status, early.memory) == ("oom", {})
    assert record(run(1, 5.0), wrong="not finite").status == "wrong"
    assert emulated_record(POINT, PLAN, found(run(1, 5.0), unfinished="no time"), PROVENANCE) is None


def test_records_survive_their_file() -> None:
    r = record(run(1, 5.0, 5.2), run(2, 9.0, 9.4))
    assert Record.from_json(r.to_json()) == r


def test_seconds_of_a_block() -> None:
    assert block_s(POINT, [run(1, 5.0, 5.2), run(2, 9.0, 9.4)]) == pytest.approx(4.1)
    assert block_s(POINT, [run(1, 5.0)]) == 5.0
    assert block_s(POINT, []) is None
