"""No compiled kernel multiplies 32-bit integers to address memory: every launcher's launches, in all their forms.

The text is Triton's own, before any optimisation. The Gluon kernel counts rows in 32 bits, as TMA does, so that there
the factor must be the rows of a tile.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

LENGTH, HEADS, WIDTH, RANKS = 819_200, 16, 1152, 8
PRODUCT = re.compile(r"arith\.muli (%\S+), (%\S+) .*: (?:tensor<[\dx]+x)?i32\b")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def narrow_products(text: str, allowed: set[int] = frozenset()) -> list[str]:
    """Lines with a product of 32-bit integers, but for those with one of the constants that are allowed."""

    def harmless(*operands: str) -> bool:
        constants = (re.fullmatch(r"%c(\d+)_i32(?:_\d+)?", operand) for operand in operands)
        return any(constant and int(constant[1]) in allowed for constant in constants)

    return [m[0] for line in text.splitlines() if (m := PRODUCT.search(line)) and not harmless(m[1], m[2])]


def attention_arguments(head_dim: int, offsets: torch.dtype | None, backward: bool) -> tuple[Any, ...]:
    qkv = meta(1, LENGTH, 3, HEADS, head_dim)
    cu = None if offsets is None else meta(9, dtype=offsets)
    if not backward:
        return (*qkv.unbind(2), 0.1, cu, cu)
    lse = meta(1, HEADS, LENGTH, dtype=torch.float32)
    out = meta(1, LENGTH, HEADS, head_dim)
    return out, lse, qkv, out, lse, 0.1, cu


def launcher_of(name: str) -> Callable[..., Any]:
    from longreel.kernels import triton_adaln, triton_attention, triton_attention_atomic, triton_residual

    module, function = {
        "attention_fwd": (triton_attention, "attention_fwd"),
        "attention_bwd": (triton_attention, "attention_packed_bwd"),
        "atomic_bwd": (triton_attention_atomic, "attention_packed_bwd"),
        "adaln_modulate_fwd": (triton_adaln, "adaln_modulate_fwd"),
        "adaln_modulate_bwd": (triton_adaln, "adaln_modulate_bwd"),
        "gated_residual_adaln_fwd": (triton_adaln, "gated_residual_adaln_fwd"),
        "gated_residual_adaln_bwd": (triton_adaln, "gated_residual_adaln_bwd"),
        "gated_residual_fwd": (triton_residual, "gated_residual_fwd"),
        "gated_residual_bwd": (triton_residual, "gated_residual_bwd"),
    }[name]
    return getattr(module, function)


def row_arguments(name: str, offsets: torch.dtype | None) -> tuple[Any, ...]:
    x, row = meta(1, LENGTH, WIDTH), meta(8 if offsets else 1, WIDTH)
    stat = meta(1, LENGTH, dtype=torch.float32)
    cu = None if offsets is None else meta(9, dtype=offsets)
    given: dict[str, tuple[Any, ...]] = {
        "adaln_modulate_fwd": (x, row, row, 1e-6),
        "adaln_modulate_bwd": (x, x, row, stat, stat),
        "gated_residual_adaln_fwd": (x, x, row, row, row, 1e-6),
        "gated_residual_adaln_bwd": (x, x, x, x, row, row, stat, stat),
        "gated_residual_fwd": (x, x, row),
        "gated_residual_bwd": (x, x, row),
    }
    return (*given[name], cu)


def check(compile_kernel: Callable[..., Any], launcher: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from longreel.kernels.triton_capture import captured_launches

    launches = captured_launches(launcher, *arguments)
    assert launches
    for launch in launches:
        kernel = compile_kernel(
            launch.kernel,
            launch.arguments,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            options=launch.options,
        )
        assert not narrow_products(kernel.ttir), kernel.name
        assert re.search(r"arith\.muli .*: (?:tensor<[\dx]+x)?i64\b", kernel.ttir), (
            f"{kernel.name}: look at the pattern"
        )


OFFSETS = [
    pytest.param(None, id="dense"),
    pytest.param(torch.int64, id="packed"),
    pytest.param(torch.int32, id="packed-int32", marks=pytest.mark.slow),
]
ATTENTION = ("attention_fwd", "attention_bwd", "atomic_bwd")
ROWS = [f"{op}_{way}" for op in ("adaln_modulate", "gated_residual", "gated_residual_adaln") for way in ("fwd", "bwd")]


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("head_dim", [72, *(pytest.param(d, marks=pytest.mark.slow) for d in (8, 40, 128))])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(compile_kernel, name, head_dim, offsets):
    arguments = attention_arguments(head_dim, offsets, backward=name.endswith("bwd"))
    check(compile_kernel, launcher_of(name), arguments)


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("name", ROWS)
def test_modulation(compile_kernel, name, offsets):
    check(compile_kernel, launcher_of(name), row_arguments(name, offsets))


def test_bias_gelu_and_merge(compile_kernel):
    from longreel.kernels import triton_gelu, triton_lse_merge

    x, bias = meta(1, LENGTH, 4 * WIDTH), meta(4 * WIDTH)
    out, lse = meta(1, LENGTH, HEADS, 72), meta(1, HEADS, LENGTH, dtype=torch.float32)
    check(compile_kernel, triton_gelu.bias_gelu_fwd, (x, bias))
    check(compile_kernel, triton_gelu.bias_gelu_bwd, (x, x, bias))
    check(compile_kernel, triton_lse_merge.merge_attention_fwd, (out, lse, out, lse))
    check(compile_kernel, triton_lse_merge.merge_attention_bwd, (out, lse, out, lse, out, lse))


def test_layouts(compile_kernel):
    from longreel.kernels import triton_sp_layout as layout

    local = LENGTH // RANKS + 1
    qkv, packed = meta(1, local, 3, HEADS, 72), meta(RANKS, 1, local, 3, HEADS // RANKS, 72)
    for bias in (None, meta(3 * HEADS * 72)):
        check(compile_kernel, layout.sp_pack_heads_fwd, (qkv, bias, RANKS))
    check(compile_kernel, layout.sp_pack_heads_bwd, (packed,))
    check(compile_kernel, layout.sp_unpack_heads_fwd, (packed,))
    check(compile_kernel, layout.sp_pack_tokens_fwd, (meta(1, LENGTH, 3, HEADS // RANKS, 72), RANKS, local))
    check(compile_kernel, layout.sp_unpack_tokens_fwd, (packed, LENGTH))


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("head_dim", [72, pytest.param(128, marks=pytest.mark.slow)])
def test_gluon_attention(compile_kernel, head_dim, offsets):
    from longreel.kernels.triton_attention_hopper import plan_forward

    qkv = meta(1, LENGTH, 3, HEADS, head_dim)
    cu = None if offsets is None else meta(9, dtype=offsets)
    out, lse = meta(1, LENGTH, HEADS, head_dim), meta(1, HEADS, LENGTH, dtype=torch.float32)
    plan = plan_forward(*qkv.unbind(2), out, lse, 0.1, cu, cu)
    kernel = compile_kernel(plan.kernel, plan.arguments, num_warps=plan.num_warps, num_stages=plan.num_stages)
    tiles = {64, 64 * plan.arguments["CONSUMERS"], plan.arguments["BLOCK_N"]}
    assert not narrow_products(kernel.ttir, tiles)
    # Strides and lengths are multiplied in 64 bits, and that product, not one made before, is what moves a pointer.
    assert re.search(r"arith\.muli .*: tensor<64xi64", kernel.ttir)
    wide = re.findall(r"tt\.addptr .*: tensor<64x1x!tt\.ptr<bf16>\S*, tensor<64x1x(i\d+)", kernel.ttir)
    assert set(wide) <= {"i64"}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("%x = arith.muli %row, %s_os : i32 loc(#loc)", True),
        ("%x = arith.muli %row, %cst : tensor<64xi32> loc(#loc)", True),
        ("%x = arith.muli %row, %c128_i32_7 : i32 loc(#loc)", False),
        ("%x = arith.muli %row, %c3456_i32 : i32 loc(#loc)", True),
        ("%x = arith.muli %row, %s_os : tensor<64x1xi64> loc(#loc)", False),
    ],
)
def test_the_check_itself(line, found):
    assert bool(narrow_products(line, {64, 128})) == found
