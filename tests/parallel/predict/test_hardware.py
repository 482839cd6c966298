"""Profiles: vendor figures as in the data sheets, assumptions marked, names checked."""

from __future__ import annotations

import pytest

from longreel.parallel.predict import hardware
from longreel.parallel.predict.hardware import PROFILES, Rate, get_profile


def test_get_profile_lists_what_exists() -> None:
    with pytest.raises(ValueError, match="unknown GPU 'V100'; profiles are A100, H800, H100, H20, H200, B200"):
        get_profile("V100")
    assert get_profile("h800").name == "H800"


def test_vendor_figures() -> None:
    figures = {p.name: (p.matmul_flops / 1e12, p.hbm_bytes_s / 1e12, p.link_bytes_s / 1e9) for p in PROFILES.values()}
    assert figures == {
        "A100": (312, 2.04, 300),
        "H800": (989, 3.35, 200),
        "H100": (989, 3.35, 450),
        "H20": (148, 4.0, 450),
        "H200": (989, 4.8, 450),
        "B200": (2250, 8.0, 900),
    }


@pytest.mark.parametrize("name", PROFILES)
def test_every_rate_is_below_the_vendor_peak_and_marked(name: str) -> None:
    profile = get_profile(name)
    for rate, peak in (
        (profile.matmul, profile.matmul_flops),
        (profile.memory, profile.hbm_bytes_s),
        (profile.link, profile.link_bytes_s),
        (profile.attention(128, backward=False), profile.matmul_flops),
    ):
        assert rate.low < rate.value < rate.high < peak
        assert rate.provenance == "assumed"
        assert rate.source
    assert 0 < profile.usable_bytes < profile.memory_bytes


def test_matmul_range_holds_the_measured_h200_product() -> None:
    matmul = get_profile("H200").matmul
    assert matmul.low < 769e12 < 798e12 < matmul.high


def test_attention_at_head_dim_72_pays_for_96_columns() -> None:
    profile = get_profile("H100")
    forward, backward = (profile.attention(72, backward=b).value / 1e12 for b in (False, True))
    # The project's estimate for FlashAttention-2 at 72.
    assert forward == pytest.approx(265, rel=0.01)
    assert backward == pytest.approx(233, rel=0.01)
    assert profile.attention(64, backward=False).value == 324e12
    with pytest.raises(ValueError, match="head_dim 136"):
        profile.attention(136, backward=False)


def test_rate_checks_its_range_and_provenance() -> None:
    with pytest.raises(ValueError, match="low <= value <= high"):
        Rate(value=1.0, low=2.0, high=3.0, provenance="assumed", source="x")
    with pytest.raises(ValueError, match="vendor, assumed, measured; got 'guess'"):
        Rate(value=1.0, low=1.0, high=1.0, provenance="guess", source="x")  # type: ignore[arg-type]
    assert hardware.MATMUL_SHARE.scaled(10.0).value == 7.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[A]\nbf16_tflops = 1\n", r"\[A\] lacks flash_attention"),
        ("[A]\nbf16_tflop = 1\n", r"has an unknown bf16_tflop|lacks bf16_tflops"),
        (
            "[A]\nbf16_tflops = 0\nhbm_tb_s = 1\nmemory_gib = 1\nflash_attention = [1, 1, 1]\n",
            "bf16_tflops must be positive and finite",
        ),
        ("[A]\nbf16_tflops = 1\nhbm_tb_s = 1\nmemory_gib = 1\nflash_attention = [1, 2, 1]\n", r"\[A\].*low <= value"),
        (
            "[A]\nbf16_tflops = inf\nhbm_tb_s = 1\nmemory_gib = 1\nflash_attention = [1, 1, 1]\n",
            "bf16_tflops must be positive and finite",
        ),
        ("[A]\nbf16_tflops = 1\nhbm_tb_s = 1\nmemory_gib = 1\nflash_attention = [1, 1]\n", "value, low and high"),
        (
            "[A]\nbf16_tflops = 1\nhbm_tb_s = 1\nmemory_gib = 1\nflash_attention = [1, 1, 1]\ngpus_per_node = 4\n",
            "lacks link_gb_s for its gpus_per_node 4",
        ),
        ("[A]\n[B]\n", "has A, B; name must be one of them"),
        ("x = [", "no profiles of GPUs there"),
    ],
)
def test_bad_profile_files(tmp_path, text, message):
    file = tmp_path / "gpus.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        get_profile(str(file))


def test_a_file_may_hold_several_gpus(tmp_path):
    file = tmp_path / "gpus.toml"
    one = "bf16_tflops = 989\nhbm_tb_s = 3.35\nmemory_gib = 80\nlink_gb_s = 450\nnode_link_gb_s = 50\n"
    file.write_text(f"[mine]\n{one}flash_attention = [1.0, 0.8, 1.1]\n[other]\n{one}flash_attention = [2, 1, 3]\n")
    mine, h100 = get_profile(f"{file}:MINE"), get_profile("h100")
    assert (mine.name, mine.matmul.value, mine.usable_bytes) == ("MINE", h100.matmul.value, h100.usable_bytes)
    assert mine.attention(72, backward=True).value == h100.attention(72, backward=True).value
    assert get_profile(f"{file}:other").flash_scale.value == 2


def test_gpus_of_a_node_or_whole_nodes():
    h100 = get_profile("H100")
    for num_gpus in (1, 3, 8, 16, 64):
        h100.check_gpus(num_gpus)
    for num_gpus in (0, 9, 12):
        with pytest.raises(ValueError, match="num_gpus must be 1 to 8"):
            h100.check_gpus(num_gpus)
