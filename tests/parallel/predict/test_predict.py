"""predict_step on the points the project quotes, and on bad cases."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch.distributed as dist

from longreel.models.config import DiTConfig, dit_xl_2
from longreel.parallel.config import ParallelConfig
from longreel.parallel.predict.hardware import GiB
from longreel.parallel.predict.predict import PredictionCase, predict_step

SMALL = DiTConfig(depth=4, hidden_size=128, num_heads=8)


def _parallel(**fields: Any) -> ParallelConfig:
    return ParallelConfig(precision="bf16", **fields)


def _xl(seq_len: int, model: DiTConfig | None = None, **parallel: Any) -> PredictionCase:
    return PredictionCase(
        model=model or dit_xl_2(), parallel=_parallel(**parallel), num_gpus=8, target="H800", seq_len=seq_len
    )


def _small(**fields: Any) -> PredictionCase:
    given: dict[str, Any] = {"model": SMALL, "parallel": _parallel(), "num_gpus": 8, "target": "H800", "seq_len": 1024}
    return PredictionCase(**(given | fields))


def test_activations_at_819200_tokens_on_8_gpus() -> None:
    prediction = predict_step(_xl(819_200, strategy="ulysses", sp_degree=8, policy="full"))
    # What comes on top of parameters, optimizer state and gradients: 675 M parameters, 16 bytes, 8 ranks.
    activations = prediction.memory_bytes - 16 * 675e6 / 8
    assert activations / GiB == pytest.approx(12.5, rel=0.05)
    assert prediction.fits
    assert prediction.flops / 1e15 == pytest.approx(305, rel=0.005)
    # Recomputation adds one forward of attention and linear layers: 4 / 3 in linears, 4.5 / 3.5 in attention.
    assert prediction.hw_flops / prediction.flops == pytest.approx(4.5 / 3.5, rel=0.005)
    assert prediction.kind == "predicted"


def test_baseline_at_819200_tokens_does_not_fit_80_gb() -> None:
    prediction = predict_step(_xl(819_200, policy="full"))
    assert not prediction.fits
    assert prediction.memory_bytes > prediction.usable_bytes
    # One block input per block: 28 * 1.76 GiB, beside gathered parameters and the inputs.
    assert prediction.kept_bytes > 28 * 819_200 * 1152 * 2
    # Attention decides; the project's estimate of a full-depth step here is 26 minutes.
    assert prediction.step_s == pytest.approx(26 * 60, rel=0.1)
    assert prediction.interval_s[0] < prediction.step_s < prediction.interval_s[1]
    assert prediction.breakdown["attention"] > 0.98 * prediction.step_s


@pytest.mark.parametrize(
    ("strategy", "degree", "gigabytes"),
    [("ulysses", 8, 0.83), ("fastseq", 2, 1.42)],
)
def test_traffic_per_layer_at_819200_tokens(strategy: str, degree: int, gigabytes: float) -> None:
    prediction = predict_step(_xl(819_200, strategy=strategy, sp_degree=degree))
    per_layer = sum(n for name, n in prediction.traffic.items() if name.startswith("sequence")) / 28 / 1e9
    # Backward sends as much again; FastSeq's besides gathers x once more.
    gathered = 819_200 * 1152 * 2 * (degree - 1) / degree / 1e9 if strategy == "fastseq" else 0.0
    assert per_layer == pytest.approx(2 * gigabytes + gathered, rel=0.01)


def test_sharding_traffic_is_bf16_parameters_and_fp32_gradients() -> None:
    prediction = predict_step(_xl(8_192, policy="full"))
    parameters = prediction.traffic["sharding.all_gather"] / 2 * 8 / 7
    assert parameters == pytest.approx(675e6, rel=0.005)
    assert prediction.traffic["sharding.reduce_scatter"] == pytest.approx(4 * parameters * 7 / 8, rel=0.005)
    again = predict_step(_xl(8_192, policy="full", engine="fsdp2-zero3"))
    # The blocks' parameters once more in backward; the root's too.
    assert again.traffic["sharding.all_gather"] == pytest.approx(
        2 * prediction.traffic["sharding.all_gather"], rel=0.01
    )
    assert again.memory_bytes < prediction.memory_bytes


def test_text_only_regime_is_bound_by_linear_layers() -> None:
    model = dit_xl_2(conditioning="cross", text_only=True, max_text_tokens=20)
    prediction = predict_step(_xl(614_400, model, policy="full"))
    assert prediction.flops / 8e15 == pytest.approx(1.4, rel=0.02)
    assert prediction.breakdown["matmul"] > 0.5 * prediction.step_s
    published = replace(model, cross_layout="published")
    exchanged = predict_step(_xl(614_400, published, strategy="ulysses", sp_degree=2, policy="full"))
    assert exchanged.traffic["sequence.all_to_all"] > 0
    ours = predict_step(_xl(614_400, model, strategy="ulysses", sp_degree=2, policy="full"))
    assert not any(name.startswith("sequence") for name in ours.traffic)


def test_memory_grows_with_length_and_recomputation_saves_it() -> None:
    full = [predict_step(_small(seq_len=n, parallel=_parallel(policy="full"))).memory_bytes for n in (4096, 16384)]
    assert full[0] < full[1]
    assert predict_step(_small(seq_len=16384)).memory_bytes > full[1]


@pytest.mark.parametrize("seq_len", [8, 1021])
def test_any_length(seq_len: int) -> None:
    prediction = predict_step(_small(seq_len=seq_len, parallel=_parallel(strategy="fastseq", sp_degree=8)))
    assert prediction.step_s > 0


def test_grid_of_a_length() -> None:
    assert _small(seq_len=819_200).grid == (3200, 16, 16)
    assert _small(seq_len=1021).grid == (1, 1, 1021)
    assert _small(seq_len=None, latent_size=(4, 16, 8)).grid == (4, 8, 4)


def test_eager_pointwise_ops_need_more_memory_and_time() -> None:
    fused, eager = (predict_step(_small(seq_len=65_536, fused_pointwise=f)) for f in (True, False))
    assert eager.memory_bytes > fused.memory_bytes
    assert eager.breakdown["memory"] > 2 * fused.breakdown["memory"]


def test_target_changes_time_and_limit_alone() -> None:
    h800, b200 = (predict_step(_small(target=t, seq_len=16_384)) for t in ("H800", "B200"))
    assert b200.step_s < h800.step_s
    assert b200.memory_limit > h800.memory_limit
    assert (b200.memory_bytes, b200.traffic, b200.hw_flops) == (h800.memory_bytes, h800.traffic, h800.hw_flops)


def test_every_figure_says_where_it_comes_from_and_goes_into_json() -> None:
    prediction = predict_step(_small())
    figures = {name: f for name, f in prediction.inputs.items() if isinstance(f, dict)}
    assert {f["provenance"] for f in figures.values()} == {"vendor", "assumed"}
    assert all(f["source"] for f in figures.values())
    assert {"matmul_flop_s", "attention_forward_flop_s", "link_byte_s", "fixed_reserve_bytes"} <= set(figures)
    json.dumps(asdict(prediction), allow_nan=False)
    assert sum(prediction.breakdown.values()) == pytest.approx(prediction.step_s)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "H900"}, "unknown GPU 'H900'; profiles are A100"),
        ({"num_gpus": 12}, "num_gpus must be 1 to 8, one node of H800.*, got 12"),
        ({"seq_len": None}, "give seq_len or latent_size"),
        ({"latent_size": (1, 2, 2)}, "give seq_len or latent_size"),
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"batch_per_group": 0}, "batch_per_group must be at least 1"),
        ({"parallel": ParallelConfig()}, "precision 'fp32' cannot be predicted"),
        ({"parallel": ParallelConfig(engine="ddp")}, "engine 'ddp' has no bf16"),
        (
            {"parallel": ParallelConfig(engine="colossalai", precision="bf16")},
            "engine 'colossalai' cannot be predicted",
        ),
        ({"parallel": _parallel(attention_provider="torch")}, "attention_provider 'torch' cannot be predicted"),
        ({"parallel": _parallel(strategy="ulysses", sp_degree=3)}, "sp_degree 3 does not divide the world size 8"),
        (
            {
                "parallel": _parallel(strategy="ulysses", sp_degree=8),
                "model": DiTConfig(depth=1, hidden_size=96, num_heads=12),
            },
            "num_heads 12 does not divide by sp_degree 8; degrees that work: 1, 2, 3, 4, 6, 12; strategy ring",
        ),
    ],
)
def test_bad_cases_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**fields)


@pytest.mark.parametrize(
    ("policy", "seq_len", "most_gib"),
    [
        pytest.param("keep_attention", 819_200, 24.0, id="keep_attention-819200"),
        pytest.param("full", 4_000_000, None, id="full-4M"),
        pytest.param("offload", 8_000_000, None, id="offload-8M"),
    ],
)
def test_long_sequences_fit_80_gb_on_8_gpus(policy, seq_len, most_gib):
    parallel = ParallelConfig(strategy="ulysses", sp_degree=8, policy=policy, precision="bf16", mlp_tile=4096)
    case = PredictionCase(model=dit_xl_2(), parallel=parallel, num_gpus=8, target="h800", seq_len=seq_len)
    prediction = predict_step(case)
    assert prediction.fits
    if most_gib is not None:
        assert prediction.memory_bytes <= most_gib * 2**30
    # A block's input and its attention's output leave the device, and the log-sum-exps of 2 heads.
    kept = 28 * (2 * seq_len // 8 * 1152 * 2 + seq_len * 2 * 4)
    assert prediction.host_bytes == pytest.approx(kept if policy == "offload" else 0, rel=0.001)
