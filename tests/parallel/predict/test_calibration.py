"""Rates out of op records, their way into predictions, and what cannot be calibrated. The records are made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from longreel.models.config import DiTConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.predict.calibration import calibrate
from longreel.parallel.predict.hardware import get_profile
from longreel.parallel.predict.predict import Prediction, PredictionCase, predict_step
from longreel.reports.op_records import OpRecord

H200 = "NVIDIA H200"
MODEL = DiTConfig(depth=4, hidden_size=256, num_heads=4)


def record(op: str, work: float, seconds: float, **changes: Any) -> OpRecord:
    is_flops = op.startswith(("attention", "matmul"))
    given: dict[str, Any] = {
        "kind": "measured",
        "status": "ok",
        "op": op,
        "direction": "forward",
        "provider": "eager",
        "dtype": "bf16",
        "device": H200,
        "shape": {"seq_len": 16_384, "head_dim": 64},
        "run": "one",
        "median_s": seconds,
        "interval_s": (0.9 * seconds, 1.2 * seconds),
        "flops": work if is_flops else None,
        "bytes_moved": None if is_flops else work,
    }
    return OpRecord(**(given | changes))


def attention(provider: str, tflops: float, *, backward: bool, seq_len: int = 16_384, **changes: Any) -> OpRecord:
    return record(
        "attention_packed",
        tflops * 1e12,
        1.0,
        provider=provider,
        direction="backward" if backward else "forward",
        shape={"seq_len": seq_len, "head_dim": 64},
        **changes,
    )


RECORDS = [
    record("matmul", 5e14, 1.0, shape={"seq_len": 512, "hidden_size": 1152}),
    record("matmul", 7e14, 1.0, shape={"seq_len": 16_384, "hidden_size": 1152}),
    record("clone", 1e9, 1 / 4000),
    record("clone", 1e6, 1e-6, shape={"seq_len": 8, "hidden_size": 64}),
    attention("triton", 400, backward=False),
    attention("triton", 450, backward=False, seq_len=65_536),
    attention("triton", 300, backward=True),
    attention("sdpa-flash", 320, backward=False),
    attention("sdpa-flash", 280, backward=True),
    attention("flash-attn-3", 500, backward=False),
    # None of these counts: not measured, wrong, another dtype.
    record("matmul", 1e18, 1.0, kind="predicted"),
    record("matmul", 1e18, 1.0, status="wrong", reason="error", median_s=None, interval_s=None),
    record("clone", 1e18, 1.0, dtype="fp32"),
]


def test_rates_are_those_of_the_records() -> None:
    rates = calibrate(RECORDS)
    assert rates.matmul is not None
    assert rates.memory is not None
    assert rates.matmul.value == 7e14
    # The longest copy, not the one that is all launch.
    assert rates.memory.value == pytest.approx(4e12)
    assert rates.matmul.provenance == "measured"
    # Samples from 0.9 to 1.2 of the median, and 3 % from run to run.
    assert rates.matmul.low == pytest.approx(7e14 / 1.2 * 0.97)
    assert rates.matmul.high == pytest.approx(7e14 / 0.9 * 1.03)
    assert rates.providers(64) == ("sdpa-flash", "triton")
    assert rates.providers(72) == ()


def test_profile_takes_the_nearest_length() -> None:
    profile = calibrate(RECORDS).on(get_profile("H200"), "triton")
    lengths = {n: profile.attention(64, backward=False, seq_len=n).value for n in (256, 20_000, 60_000, 10**6)}
    assert lengths == {256: 4e14, 20_000: 4e14, 60_000: 4.5e14, 10**6: 4.5e14}
    assert profile.attention(64, backward=True).value == 3e14
    # Of another head_dim nothing was measured.
    assert profile.attention(72, backward=True) == get_profile("H200").attention(72, backward=True)


def test_another_gpu_is_scaled_and_its_range_wider() -> None:
    rates = calibrate(RECORDS)
    same, other = (rates.on(get_profile(name), "triton") for name in ("H200", "H20"))
    assert same.matmul == rates.matmul
    assert other.matmul.value == pytest.approx(7e14 * 148 / 989)
    assert other.memory.value == pytest.approx(4e12 * 4.0 / 4.8)
    assert other.matmul.provenance == "assumed"
    assert other.matmul.low / other.matmul.value < same.matmul.low / same.matmul.value
    with pytest.raises(ValueError, match="which has no profile to scale them to H20 by"):
        calibrate([replace(r, device="a CPU") for r in RECORDS]).on(get_profile("H20"), "triton")


def predicted(provider: str, **changes: Any) -> Prediction:
    given: dict[str, Any] = {"target": "H200", "seq_len": 65_536, "num_gpus": 1, "rates": calibrate(RECORDS)}
    parallel = ParallelConfig(precision="bf16", attention_provider=provider)
    return predict_step(PredictionCase(model=MODEL, parallel=parallel, **(given | changes)))


def test_prediction_leans_on_them_and_says_so() -> None:
    triton, flash = predicted("triton"), predicted("auto")
    assert triton.inputs["matmul_flop_s"]["provenance"] == "measured"
    assert "attention_packed forward by triton on NVIDIA H200" in triton.inputs["attention_forward_flop_s"]["source"]
    assert triton.inputs["link_byte_s"]["provenance"] == "assumed"
    # Forward is 2 of 7 products, at the rates of each direction and of the length.
    flops = 14 * 65_536**2 * 256 * 4
    expected = flops * (2 / 4.5e14 + 5 / 3e14) / 7
    assert triton.breakdown["attention"] == pytest.approx(expected, rel=1e-3)
    assert triton.breakdown["attention"] < flash.breakdown["attention"]
    assert triton.interval_s[0] < triton.step_s < triton.interval_s[1]


@pytest.mark.parametrize(
    ("provider", "changes"),
    [("triton", {"rates": None}), ("triton-hopper", {}), ("flash-attn-3", {})],
    ids=["nothing-measured", "not-this-one", "forward-only"],
)
def test_a_provider_without_rates_is_an_error(provider: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"attention_provider '{provider}' cannot be predicted.*calibrate on op rec"):
        predicted(provider, **changes)


@pytest.mark.parametrize(
    ("records", "message"),
    [([], "none measured in bf16"), ([*RECORDS, replace(RECORDS[0], device="NVIDIA H100")], "of several devices")],
)
def test_what_cannot_be_calibrated_on(records: list[OpRecord], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(records)
    if records:
        assert calibrate(records, device=H200) == calibrate(RECORDS)
