"""The warp-specialised Gluon kernel as compiled for sm_90, and the constants by which attention launches."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

HEADS = 16


def launch(head_dim: int, dtype: torch.dtype = torch.bfloat16, *, packed: bool = False, length: int = 819_200) -> Any:
    from longreel.kernels.triton_attention_hopper import check_hopper, plan_forward

    qkv = torch.empty(1, length, 3, HEADS, head_dim, dtype=dtype, device="meta")
    cu = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    check_hopper(*qkv.unbind(2))
    out = qkv.new_empty(1, length, HEADS, head_dim)
    lse = qkv.new_empty(1, HEADS, length, dtype=torch.float32)
    return plan_forward(*qkv.unbind(2), out, lse, 0.1, cu, cu)


def compiled(compile_kernel: Any, plan: Any) -> Any:
    return compile_kernel(plan.kernel, plan.arguments, num_warps=plan.num_warps, num_stages=plan.num_stages)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_compiled_for_hopper(compile_kernel, head_dim, packed):
    kernel = compiled(compile_kernel, launch(head_dim, packed=packed))
    assert kernel.local_bytes == kernel.spills == 0
    # Two consumers, and a warpgroup for the producer; their registers fill the multiprocessor.
    assert kernel.num_warps == 12
    assert kernel.programs_per_sm() == 1
    assert "cp.async.bulk.tensor.4d" in kernel.ptx
    assert not re.search(r"cp\.async\.c[ag]|ldmatrix|ld\.global\S*b16", kernel.ptx)
    assert {0xF0, 0x18} <= {int(n, 0) for n in re.findall(r"USETMAXREG\S+ (?:UP0, )?(0x[0-9a-f]+)", kernel.sass)}


@pytest.mark.parametrize("head_dim", [64, 72])
def test_cleared_rows_of_v_are_seen_by_the_product(compile_kernel, head_dim):
    first, product = "wgmma.mma_async", "wgmma.mma_async.sync.aligned.m64n64k16"
    before = compiled(compile_kernel, launch(head_dim, packed=True)).ptx.split(product, 1)[0]
    # A consumer's threads write, tell the asynchronous proxy, and wait for each other, in this order.
    order = [before.rfind(step) for step in ("st.shared.v4", "fence.proxy.async", "bar.sync")]
    assert before.find(first) < order[0] and order == sorted(order)
    # Where TMA reads zeros behind the last key there is nothing to clear.
    assert "st.shared.v4" not in compiled(compile_kernel, launch(head_dim)).ptx.split(first, 1)[1]


def test_head_dim_72_is_80_columns_and_its_sums_come_from_the_product(compile_kernel):
    ptx = compiled(compile_kernel, launch(72)).ptx
    shapes = Counter(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16", ptx))
    # Per consumer, in the loop and outside it: 5 steps of scores; 8 of output in 64 columns and 8 in 16.
    assert shapes == {"128": 2 * 2 * 5, "64": 2 * 2 * 8, "16": 2 * 2 * 8}
    # The tail's two stacks of core matrices: 1024 and 2048 bytes apart for q and k; for v, keys 128, columns 2048.
    for descriptor in (0x8_0040_0000, 0x8_0080_0000, 0x80_0008_0000):
        assert re.search(rf"or\.b64\s+%rd\d+, %rd\d+, {descriptor};", ptx), hex(descriptor)


@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_softmax_runs_beside_the_product_with_v(compile_kernel, head_dim):
    lines = compiled(compile_kernel, launch(head_dim)).sass.splitlines()
    text = [line for line in lines if re.search(r"HGMMA|DEPBAR|MUFU\.EX2|BRA", line)]
    later = 2 if head_dim == 72 else 1
    begin = next(i for i, line in enumerate(text) if f"DEPBAR.LE gsb0, 0x{later}" in line)
    end = next(i for i, line in enumerate(text[begin:], begin) if "DEPBAR.LE gsb0, 0x0" in line)
    # All exponentials of 64 scores a thread but those of the polynomials lie between the two waits.
    assert sum("MUFU.EX2" in line for line in text[begin:end]) >= 48
    # ptxas has not put a wait behind every wgmma.
    products = "".join("H" if "HGMMA" in line else "W" for line in text if "HGMMA" in line or "DEPBAR" in line)
    assert "HWHWH" not in products


def test_other_candidates_compile_without_spills(compile_kernel):
    from longreel.kernels.triton_attention_hopper import plan_forward
    from longreel.kernels.triton_attention_tuning import hopper_candidates

    plan = launch(72)
    q, k, v = (plan.arguments[n].base for n in ("q0", "k0", "v0"))
    tiles = next(t for t in hopper_candidates(72, "long") if t.consumers == 3)
    plan = plan_forward(q, k, v, plan.arguments["out"], plan.arguments["lse"], 0.1, None, None, tiles=tiles)
    kernel = compiled(compile_kernel, plan)
    assert kernel.local_bytes == kernel.spills == 0
    assert kernel.num_warps == 16


@pytest.mark.parametrize("length", ["short", "long"])
def test_tuning_constants_say_what_they_rest_on_and_candidates_begin_with_the_launch_own(length):
    from longreel.kernels import triton_attention_tuning as tuning

    constants = [*tuning.TILES.values(), *tuning.MEASURED.values(), tuning.TILES_FP32]
    for tiles in [*constants, *tuning.HOPPER_TILES.values(), *tuning.MEASURED_HOPPER.values()]:
        assert (tiles.evidence == "measured") == (tiles.record is not None), tiles
    rows = tuning.LONG if length == "long" else 4096
    assert tuning.length_class(rows) == length
    for direction in ("forward", "dkdv", "dq", "fused"):
        own = tuning.attention_tiles(direction, 80, torch.bfloat16, rows)
        listed = tuning.candidates(direction, 80, length)
        assert listed[0] == own
        assert len(set(listed)) == len(listed) >= 4
    assert tuning.hopper_candidates(72, length)[0] == tuning.hopper_tiles(72, rows)


def test_measured_constants_replace_assumed_ones_of_their_length_class(monkeypatch):
    from longreel.kernels import triton_attention_tuning as tuning

    found = tuning.AttentionTiles(
        block_m=64, block_n=32, num_warps=4, num_stages=2, planned_programs=1, evidence="measured", record="r1"
    )
    monkeypatch.setitem(tuning.MEASURED, ("dq", 80, "short"), found)
    assert tuning.attention_tiles("dq", 80, torch.bfloat16, 100) == found
    assert tuning.attention_tiles("dq", 80, torch.bfloat16, tuning.LONG) == tuning.TILES["dq", 80]
