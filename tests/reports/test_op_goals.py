"""Goals against figures: the worst point counts, each by our fastest kernel that qualifies."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from longreel.reports.op_goals import GOALS, HEADINGS, goal_lines, goal_rows
from longreel.reports.op_records import OpRecord

_SPEC = importlib.util.spec_from_file_location("op_records_of_goals", Path(__file__).with_name("test_op_report.py"))
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
op_record = _MODULE.op_record


def attention(seq_len: int, direction: str, provider: str, tflops: float, **changes: Any) -> OpRecord:
    shape = {"batch": 1, "seq_len": seq_len, "num_heads": 2, "head_dim": 72} | changes.pop("shape", {})
    ours = provider.startswith("triton")
    values = {"direction": direction, "provider": provider, "is_ours": ours, "shape": shape, "flops": 1e12}
    return op_record(**values | {"median_s": 1 / tflops} | changes)


def rows_op(op: str, direction: str, fraction: float, **changes: Any) -> OpRecord:
    """At this part of clone's rate, which is 4 TB/s."""
    shape = {"batch": 1, "seq_len": 131_072, "hidden_size": 1152} | changes.pop("shape", {})
    values = {"op": op, "direction": direction, "shape": shape, "flops": None, "bytes_moved": 4e9}
    return op_record(**values | {"median_s": 1e-3 / fraction} | changes)


CLONE = rows_op("clone", "forward", 1.0, provider="eager", is_ours=False)


def found(records: list[OpRecord], device: str = "a GPU") -> dict[str, dict[str, str]]:
    return {
        f"{row[0]} [{goal.unit}]": dict(zip(HEADINGS[1:], row[1:], strict=True))
        for goal, row in zip(GOALS, goal_rows(records)[device], strict=True)
    }


def test_the_worst_length_counts_and_the_fastest_kernel_at_it():
    row = found(
        [
            attention(4096, "forward", "triton", 100.0),
            attention(32_768, "forward", "triton", 300.0),
            attention(32_768, "forward", "triton-hopper", 510.0),
            attention(65_536, "forward", "triton-hopper", 460.0),
            attention(65_536, "forward", "triton-hopper", 90.0, config={"label": "tune hopper 72 long"}),
            attention(65_536, "forward", "triton-hopper", 80.0, shape={"head_dim": 128}),
            attention(65_536, "forward", "triton-hopper", 70.0, op="attention_text"),
        ]
    )["attention forward [TFLOP/s]"]
    assert row == {
        "Goal at": "450 TFLOP/s",
        "Beyond at": "500 TFLOP/s",
        "Measured": "460 TFLOP/s",
        "Met": "yes",
        "Worst at": "attention 65,536, triton-hopper",
    }


def test_a_goal_of_deterministic_kernels_is_not_met_by_another():
    rows = found(
        [
            attention(32_768, "backward", "triton", 306.0),
            attention(32_768, "backward", "triton-atomic", 410.0),
            attention(32_768, "backward", "triton-hopper-atomic", 420.0),
        ]
    )
    assert rows["attention backward, deterministic [TFLOP/s]"]["Measured"] == "306 TFLOP/s"
    assert rows["attention backward, deterministic [TFLOP/s]"]["Met"] == "no, 90 % of it"
    assert rows["attention backward, fastest form [TFLOP/s]"]["Measured"] == "420 TFLOP/s"
    assert rows["attention backward, fastest form [TFLOP/s]"]["Met"] == "beyond"


def test_ratios_are_to_the_peer_of_that_name():
    rows = found(
        [
            attention(32_768, "both", "triton-hopper-atomic", 440.0),
            attention(32_768, "both", "sdpa-cudnn", 400.0),
            attention(32_768, "both", "sdpa-flash", 220.0),
            # Of another run.
            attention(32_768, "both", "sdpa-flash", 1.0, run="r2", provenance={"source": "xyz"}),
            attention(32_768, "forward", "triton", 400.0),
            attention(32_768, "forward", "flash-attn-4", 400.0),
        ]
    )
    flash, cudnn = (rows[f"attention forward and backward [x {name}]"] for name in ("sdpa-flash", "sdpa-cudnn"))
    assert (flash["Goal at"], flash["Measured"], flash["Met"]) == ("1.50 x sdpa-flash", "2.00 x sdpa-flash", "yes")
    assert (cudnn["Beyond at"], cudnn["Measured"], cudnn["Met"]) == ("1.20 x sdpa-cudnn", "1.10 x sdpa-cudnn", "yes")
    # As fast as the best peer is not faster.
    every = rows["attention forward, faster than every peer [x best peer]"]
    assert (every["Measured"], every["Met"]) == ("1.00 x best peer", "no, 100 % of it")


@pytest.mark.parametrize(("long", "met"), [(486.0, "yes"), (484.0, "no"), (510.0, "yes")])
def test_fall_off_is_between_the_fastest_at_either_length(long, met):
    rows = found(
        [
            attention(65_536, "forward", "triton", 490.0),
            attention(65_536, "forward", "triton-hopper", 500.0),
            attention(819_200, "forward", "triton-hopper-atomic", long),
            attention(819_200, "forward", "triton", 480.0),
            # Of more heads, another pass, a peer: not compared.
            attention(65_536, "forward", "triton", 900.0, shape={"num_heads": 16}),
            attention(819_200, "forward", "triton", 1.0, config={"label": "after"}),
            attention(65_536, "forward", "sdpa-cudnn", 900.0),
        ]
    )
    row = rows["attention forward, 819,200 against 65,536 tokens [fall-off]"]
    assert row["Measured"] == f"{100 * (1 - long / 500):.1f} % fall-off"
    assert row["Met"] == met
    assert row["Worst at"] == "attention 819,200, triton-hopper-atomic, triton-hopper at 65,536"
    assert rows["attention forward and backward, 819,200 against 65,536 tokens [fall-off]"]["Met"] == "not measured"


def test_memory_bound_ops_are_held_to_clone():
    rows = found(
        [
            CLONE,
            rows_op("sp_pack_heads", "forward", 0.99),
            rows_op("sp_unpack_tokens", "forward", 0.94),
            rows_op("bias_gelu", "backward", 0.93),
            rows_op("adaln_modulate", "forward", 0.96),
        ]
    )
    assert rows["pack and unpack, forward [of clone]"]["Measured"] == "94.0 % of clone"
    assert rows["pack and unpack, forward [of clone]"]["Met"] == "no, 99 % of it"
    assert rows["bias-GELU, backward [of clone]"]["Met"] == "beyond"
    assert rows["bias-GELU, forward [of clone]"]["Met"] == "not measured"
    adaln = rows["adaLN, forward [of clone]"]
    assert (adaln["Goal at"], adaln["Beyond at"], adaln["Met"]) == ("95.0 % of clone", "98.0 % of clone", "yes")


def test_the_last_pass_that_measured_a_goal_counts():
    before, after = {"config": {"label": "before"}}, {"config": {"label": "after"}}
    rows = found(
        [
            attention(32_768, "forward", "triton", 460.0, **before),
            attention(32_768, "backward", "triton", 350.0, **before),
            attention(32_768, "forward", "triton", 440.0, **after),
        ]
    )
    assert rows["attention forward [TFLOP/s]"]["Measured"] == "440 TFLOP/s"
    assert rows["attention forward [TFLOP/s]"]["Worst at"].endswith("(after)")
    assert rows["attention backward, deterministic [TFLOP/s]"]["Worst at"].endswith("(before)")


def test_only_what_a_gpu_measured_is_held_to_goals():
    assert goal_lines([op_record(device="CPU with 2 cores, Triton interpreted"), op_record(kind="predicted")]) == []
    assert goal_lines([attention(32_768, "forward", "sdpa-cudnn", 500.0)]) == []
    lines = goal_lines([attention(32_768, "forward", "triton", 500.0)])
    assert len(lines) == 2 + len(GOALS)
    assert sum("not measured" in line for line in lines) == len(GOALS) - 1


def test_goals_are_those_that_were_set():
    text = {(g.name, g.direction, g.unit): (g.at, g.beyond) for g in GOALS}
    assert len(text) == len(GOALS) == 16
    assert text["attention forward", "forward", "TFLOP/s"] == (450.0, 500.0)
    assert text["attention backward, deterministic", "backward", "TFLOP/s"] == (340.0, None)
    assert text["attention backward, fastest form", "backward", "TFLOP/s"] == (None, 400.0)
    assert [v for (n, d, u), v in text.items() if u == "of clone" and d == "forward"] == [(0.95, 0.98)] * 4
    assert [v for (n, d, u), v in text.items() if u == "of clone" and d == "backward"] == [(0.88, 0.92)] * 4
