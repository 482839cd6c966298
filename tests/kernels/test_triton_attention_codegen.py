"""The Triton attention kernels as compiled for Hopper at their production tiles, without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

KERNELS = ("attention_fwd_kernel", "attention_delta_kernel", "attention_dkdv_kernel", "attention_dq_kernel")
# lse and delta are one fp32 per row: one or two of them to a thread.
ROW_BYTES = {4, 8}


def launches(head_dim: int, dtype: torch.dtype, *, packed: bool = False, length: int = 819_200) -> dict[str, Any]:
    """The launches of attention_packed with 16 heads, forward and backward, by kernel, on meta tensors."""
    from longreel.kernels.triton_attention_plan import plan_backward, plan_forward

    heads = 16
    qkv = torch.empty(1, length, 3, heads, head_dim, dtype=dtype, device="meta")
    out = qkv.new_empty(1, length, heads, head_dim)
    lse = qkv.new_empty(1, heads, length, dtype=torch.float32)
    cu = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    views = qkv.unbind(2)
    plans = [
        plan_forward(*views, out, lse, 0.1, cu, cu),
        *plan_backward(torch.empty_like(qkv).unbind(2), out, None, views, out, lse, 0.1, cu, cu),
    ]
    return {plan.kernel.__name__: plan for plan in plans}


def fused_launch(head_dim: int, dtype: torch.dtype = torch.bfloat16, *, packed: bool = False) -> Any:
    """The kernel of provider triton-atomic that computes dk, dv and dq."""
    from longreel.kernels.triton_attention_plan import plan_backward

    qkv = torch.empty(1, 819_200, 3, 16, head_dim, dtype=dtype, device="meta")
    cu = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    out = qkv.new_empty(1, 819_200, 16, head_dim)
    lse = qkv.new_empty(1, 16, 819_200, dtype=torch.float32)
    dq_sum = qkv.new_empty(1, 16, 819_200, head_dim, dtype=torch.float32)
    views = qkv.unbind(2)
    delta, fused = plan_backward(views, out, None, views, out, lse, 0.1, cu, cu, dq_sum)
    assert delta.kernel.__name__ == "attention_delta_kernel"
    return fused


def compiled(compile_kernel, plan: Any) -> Any:
    return compile_kernel(
        plan.kernel, plan.arguments, num_warps=plan.num_warps, num_stages=plan.num_stages, options=plan.options
    )


def copy_widths(ptx: str) -> Counter[int]:
    """Bytes of every asynchronous copy from global to shared memory."""
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)", ptx)
    return Counter(int(size, 0) for size in sizes)


def load_widths(ptx: str) -> Counter[int]:
    """Bytes a thread gets from every load of global memory."""
    found = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\s", ptx)
    return Counter(int(count or 1) * int(bits) // 8 for count, bits in found)


def check_no_32_bit_products(ttir: str) -> None:
    """Before the compiler optimises: an index times a stride is 64-bit where there is no 32-bit product at all."""
    products = [
        line.strip() for line in ttir.splitlines() if re.search(r"arith\.muli .*: (tensor<[\dx]+x)?i32\b", line)
    ]
    assert not products, products
    assert re.search(r"arith\.muli .*: (tensor<[\dx]+x)?i64\b", ttir), "no product at all: look at the pattern"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("head_dim", "packed"), [(64, False), (72, False), (72, True), (128, False)])
def test_compiled_for_hopper(compile_kernel, head_dim, packed, name):
    plan = launches(head_dim, torch.bfloat16, packed=packed)[name]
    kernel = compiled(compile_kernel, plan)
    assert kernel.local_bytes == 0
    assert kernel.spills == 0
    assert kernel.programs_per_sm() >= plan.planned_programs
    check_no_32_bit_products(kernel.ttir)
    loads, copies = load_widths(kernel.ptx), copy_widths(kernel.ptx)
    if name == "attention_delta_kernel":
        # out and dout, and one lse to a thread.
        assert set(loads) == {16, 4}
        return
    assert "wgmma.mma_async.sync" in kernel.ptx
    # Conversions of single values take the units that exponentials need.
    assert "F2F." not in kernel.sass
    # 16 columns of 64 rows are 8 bytes for each of 256 threads; every other tile gives a thread 16.
    spread = {8} if head_dim == 72 and plan.num_warps == 8 else set()
    assert set(copies) - {16} <= (ROW_BYTES if name == "attention_dkdv_kernel" else spread)
    # One iteration's two tiles of streamed rows (k and v, or q and dout) go in 16-byte copies, but for that part.
    given = plan.arguments
    rows = given["BLOCK_M" if name == "attention_dkdv_kernel" else "BLOCK_N"]
    columns = given["D0"] if spread else given["D0"] + given["D1"]
    assert copies[16] * 16 * 32 * plan.num_warps >= 2 * rows * columns * 2
    # Rows outside the loop: q, and the ragged last tile. Below 8 bytes only values per row are left.
    assert not {1, 2} & set(loads)


@pytest.mark.parametrize(("head_dim", "packed"), [(64, False), (72, False), (72, True), (128, False)])
def test_atomic_backward_adds_16_bytes_at_a_time(compile_kernel, head_dim, packed):
    plan = fused_launch(head_dim, packed=packed)
    kernel = compiled(compile_kernel, plan)
    assert kernel.local_bytes == kernel.spills == 0
    assert kernel.programs_per_sm() >= plan.planned_programs
    check_no_32_bit_products(kernel.ttir)
    added = re.findall(r"(?:red|atom)\.global\S*\.add\S*f32", kernel.ptx)
    assert added and all(".v4" in name for name in added), set(added)


@pytest.mark.parametrize("name", ["attention_fwd_kernel", "attention_dkdv_kernel", "attention_dq_kernel"])
def test_odd_lengths_spill_nothing(compile_kernel, name):
    # No value of the launch divides by 16 that the length gives.
    plan = launches(72, torch.bfloat16, length=819_201)[name]
    kernel = compiled(compile_kernel, plan)
    assert kernel.local_bytes == kernel.spills == 0
    assert kernel.programs_per_sm() >= plan.planned_programs


def test_head_dim_72_computes_80_columns(compile_kernel):
    kernel = compiled(compile_kernel, launches(72, torch.bfloat16)["attention_fwd_kernel"])
    shapes = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16", kernel.ptx))
    # Scores of 64 keys from 64 + 16 columns, and 64 + 16 columns of output: nothing is padded to 128.
    assert shapes == {"64", "16"}


def test_without_the_unit_of_strides_loads_would_be_narrow(compile_kernel):
    plan = launches(72, torch.bfloat16)["attention_fwd_kernel"]
    strides = {name: value * 8 for name, value in plan.arguments.items() if name.startswith("s_")}
    plan.arguments.update(strides, ALIGN=1)
    kernel = compiled(compile_kernel, plan)
    assert min(load_widths(kernel.ptx) + copy_widths(kernel.ptx)) < 8 or 16 not in copy_widths(kernel.ptx)


@triton.jit
def narrow_index_kernel(x, stride, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(x + o_x, tl.load(x + o_x) + 1)


def test_check_of_products_finds_a_32_bit_one(compile_kernel):
    kernel = compile_kernel(narrow_index_kernel, {"x": torch.float32, "stride": 72, "BLOCK": 64})
    with pytest.raises(AssertionError, match="muli"):
        check_no_32_bit_products(kernel.ttir)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("head_dim", [8, 24, 40, 56, 64, 72, 88, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_width_compiles_without_spills(compile_kernel, dtype, head_dim, packed):
    for plan in launches(head_dim, dtype, packed=packed).values():
        kernel = compiled(compile_kernel, plan)
        assert kernel.local_bytes == 0, kernel.name
        assert kernel.programs_per_sm() >= plan.planned_programs
        check_no_32_bit_products(kernel.ttir)
    kernel = compiled(compile_kernel, fused_launch(head_dim, dtype, packed=packed))
    # See its tuning constants: 88 and 96 columns are more than registers hold, outside the loop.
    assert kernel.local_bytes <= (48 if head_dim in (88, 96) else 0)


@pytest.mark.slow
def test_all_of_this_file_holds_under_triton_36():
    folder = Path(sys.prefix) / "triton-3.6.0"
    if not (folder / ".installed").exists():
        pytest.skip("triton 3.6.0 is not set up: make setup-triton36")
    environment = os.environ | {"PYTHONPATH": str(folder)}
    check = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    assert subprocess.run(check, env=environment, capture_output=True, text=True).stdout == "3.6.0\n"
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    found = subprocess.run(tests, env=environment, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stdout
    assert " passed" in found.stdout and " skipped" not in found.stdout
