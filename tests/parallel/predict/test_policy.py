"""Policy `auto`: the cheapest that fits, the same for the same arguments, and what it says when none does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from longreel.models.config import DiTConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.predict.hardware import GiB, get_profile
from longreel.parallel.predict.policy import ORDER, PolicyChoice, choose_policy, known_gpu, under_policy

MODEL = DiTConfig(depth=6, hidden_size=256, num_heads=8)
BF16 = ParallelConfig(strategy="ulysses", sp_degree=4, policy="auto", precision="bf16")


def choose(parallel: ParallelConfig = BF16, **changes: Any) -> PolicyChoice:
    given: dict[str, Any] = {
        "world_size": 4,
        "grid": (64, 32, 32),
        "batch": 1,
        "limit_bytes": 1 << 60,
        "host_limit_bytes": 1 << 60,
    }
    return choose_policy(MODEL, parallel, **(given | changes))


@pytest.fixture(scope="module")
def needs() -> dict[str, Any]:
    """What every policy needs, from a choice that has times and therefore tries all."""
    return {need.policy: need for need in choose(gpu=get_profile("H100")).needs}


def test_more_memory_saved_further_down_the_order(needs):
    assert tuple(needs) == ORDER
    assert needs["none"].device_bytes > needs["keep_attention"].device_bytes > needs["full"].device_bytes
    assert needs["full"].device_bytes > needs["offload"].device_bytes
    assert [policy for policy, need in needs.items() if need.host_bytes] == ["offload"]


def test_without_rates_the_first_of_the_order_that_fits(needs):
    for i, policy in enumerate(ORDER):
        assert choose(limit_bytes=needs[policy].device_bytes).policy == policy
        if i + 1 < len(ORDER):
            assert choose(limit_bytes=needs[policy].device_bytes - 1).policy == ORDER[i + 1]
    assert not any(need.seconds for need in choose().needs)


def test_with_rates_the_fastest_that_fits(needs):
    gpu = get_profile("H100")
    assert choose(gpu=gpu).policy == min(needs.values(), key=lambda need: need.seconds).policy
    # Attention at this length is most of the work, and `full` computes it again; transfers hide behind it.
    long = {"gpu": gpu, "grid": (512, 32, 32)}
    by_policy = {need.policy: need for need in choose(**long).needs}
    assert by_policy["offload"].seconds < by_policy["full"].seconds
    limit = by_policy["full"].device_bytes
    assert limit >= by_policy["offload"].device_bytes
    choice = choose(**long, limit_bytes=limit)
    assert choice.policy == "offload"
    assert "shortest predicted step on H100" in choice.reason
    # The rates are those of bf16.
    assert choose(replace(BF16, precision="fp16"), **long, limit_bytes=limit).policy == "full"


def test_offload_needs_host_memory_too(needs):
    limit, host = needs["offload"].device_bytes, needs["offload"].host_bytes
    assert choose(limit_bytes=limit, host_limit_bytes=host).policy == "offload"
    with pytest.raises(ValueError, match=r"what would help: a larger host_memory_gib, more ranks"):
        choose(limit_bytes=limit, host_limit_bytes=host - 1)


def test_no_fit_names_every_need_and_what_would_help():
    with pytest.raises(ValueError, match=r"none fits 9.313e-07 GiB per rank: none ") as error:
        choose(replace(BF16, sp_degree=2), limit_bytes=1000, batch=2)
    message = str(error.value)
    assert all(f"{policy} " in message for policy in ORDER)
    assert "an sp_degree up to 4, more ranks, engine fsdp2-zero3, mlp_tile 4096, a smaller batch_size" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "colossalai"}, "cannot foresee the memory of engine 'colossalai'"),
        ({"engine": "ddp", "precision": "fp32"}, "cannot foresee the memory of engine 'ddp'"),
        ({"precision": "fp64"}, "cannot foresee precision fp64"),
        ({"sp_degree": 3, "strategy": "ring"}, "sp_degree 3 does not divide the world size 4"),
        ({"sp_degree": 16}, "num_heads 8 does not divide by sp_degree 16"),
    ],
)
def test_what_cannot_be_foreseen_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        choose(replace(BF16, **change))


def test_devices_by_the_drivers_name():
    for name, profile in (("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA H20", "H20")):
        found = known_gpu(name, 8)
        assert found is not None
        assert found.name == profile
    assert known_gpu("NVIDIA GeForce RTX 4090", 1) is None
    assert known_gpu("", 1) is None
    # Whole nodes are.
    assert known_gpu("NVIDIA H100 80GB HBM3", 16) is not None
    assert known_gpu("NVIDIA H100 80GB HBM3", 12) is None


def test_eager_attention_counts_its_scores():
    short = {"grid": (1, 32, 32), "world_size": 1}
    local = ParallelConfig(policy="auto", precision="fp32")
    flash, eager = (choose(local, **short, attention_provider=p).needs[0] for p in ("sdpa-flash", "torch"))
    # 8 heads of 1024 x 1024 scores, in fp32.
    assert eager.device_bytes - flash.device_bytes > 8 * 1024**2 * 4 > 0.03 * GiB


def test_what_a_policy_does_not_take_goes_with_the_others_only():
    asked = ParallelConfig(
        strategy="fastseq",
        sp_degree=2,
        policy="auto",
        fastseq_keep_gathered=True,
        memory_limit_gib=1,
        host_memory_gib=2,
    )
    found = {policy: under_policy(asked, policy) for policy in ORDER}
    assert [policy for policy in ORDER if found[policy].fastseq_keep_gathered] == ["none", "full"]
    assert all(one.memory_limit_gib is None and one.host_memory_gib is None for one in found.values())
    assert under_policy(asked, "offload", host_memory_gib=2).host_memory_gib == 2
    with pytest.raises(ValueError, match="fastseq_keep_gathered goes with strategy 'fastseq' and policy 'none' or"):
        replace(asked, policy="keep_attention", memory_limit_gib=None, host_memory_gib=None)
    with pytest.raises(ValueError, match="fastseq_keep_gathered goes with strategy 'fastseq'"):
        replace(asked, strategy="ring")
