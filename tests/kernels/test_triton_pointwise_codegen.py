"""The Triton kernels of the memory-bound ops as compiled for Hopper at DiT-XL/2's sizes: spills, loads, offsets."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")


def production_kernels(packed: bool) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Kernel and arguments at DiT-XL/2's widths, 819,200 rows of bf16."""
    from longreel.kernels import triton_adaln, triton_gelu, triton_residual, triton_rows
    from longreel.kernels.triton_rows_tuning import RowKernel, row_tiles

    half, full, rows = torch.bfloat16, torch.float32, 819_200
    offsets = {"cu_seqlens": torch.int64 if packed else None, "seq_len": rows, "CHUNK": 256}
    segments = offsets | {"num_rows": rows, "num_segments": 8 if packed else 2}
    tile = triton_residual.tile_options("gated_fwd", rows, 1152)
    mlp = {"num_rows": rows} | triton_residual.tile_options("gelu_fwd", rows, 4608)
    stride = 6 * 1152

    def rows_like(kernel: RowKernel) -> dict[str, int]:
        return triton_adaln.row_options(1152, row_tiles(kernel, rows).per_warp)

    forward = {"x": half, "shift": half, "scale": half, "out": half, "mean": full, "rstd": full, "eps": 1e-6}
    forward |= {"stride_gate": stride, "stride_shift": stride, "stride_scale": stride, **segments}
    backward = {"dout": half, "z": half, "scale": half, "mean": full, "rstd": full, "dx": half, **segments}
    backward |= {"slots_shift": full, "slots_scale": full, "stride_gate": stride, "stride_scale": stride}
    residual = {"y": half, "gate": half}
    return {
        "adaln_fwd": (
            triton_adaln.adaln_fwd_kernel,
            forward | {"y": None, "gate": None, "z": None} | rows_like("adaln_fwd"),
        ),
        "adaln_bwd": (
            triton_adaln.adaln_bwd_kernel,
            backward | dict.fromkeys(("y", "gate", "dz", "dy", "slots_gate")) | rows_like("adaln_bwd"),
        ),
        "fused_fwd": (
            triton_adaln.adaln_fwd_kernel,
            forward | residual | {"z": half} | rows_like("gated_adaln_fwd"),
        ),
        "fused_bwd": (
            triton_adaln.adaln_bwd_kernel,
            backward | residual | {"dz": half, "dy": half, "slots_gate": full} | rows_like("gated_adaln_bwd"),
        ),
        "gated_fwd": (
            triton_residual.gated_residual_fwd_kernel,
            {"x": half, **residual, "z": half, "stride_gate": stride, **segments, **tile},
        ),
        "gated_bwd": (
            triton_residual.gated_residual_bwd_kernel,
            {"dz": half, **residual, "dy": half, "slots": full, "stride_gate": stride, **segments, **tile},
        ),
        "gelu_fwd": (triton_gelu.bias_gelu_fwd_kernel, {"x": half, "bias": half, "y": half, **mlp}),
        "gelu_bwd": (
            triton_gelu.bias_gelu_bwd_kernel,
            {"dy": half, "x": half, "bias": half, "dx": half, "slots": full, **mlp},
        ),
        "sum_slots": (
            triton_rows.sum_slots_kernel,
            {"slots": full, "out": half, **offsets, "C": 1152, "BLOCK_P": 128, "BLOCK_C": 32},
        ),
    }


# Tensors of activations that a kernel reads.
READS = {
    "adaln_fwd": 1,
    "adaln_bwd": 2,
    "fused_fwd": 2,
    "fused_bwd": 4,
    "gated_fwd": 2,
    "gated_bwd": 2,
    "gelu_fwd": 1,
    "gelu_bwd": 2,
    "sum_slots": 0,
}


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["samples", "packed"])
@pytest.mark.parametrize("name", READS)
def test_compiles_for_hopper_without_spills(compile_kernel, name, packed):
    if packed and name.startswith("gelu"):
        pytest.skip("bias-GELU has no segments")
    kernel, arguments = production_kernels(packed)[name]
    num_warps = arguments.pop("num_warps", 4)
    compiled = compile_kernel(kernel, arguments, num_warps=num_warps)
    assert compiled.spills == compiled.local_bytes == 0
    assert "ld.global.v4.b32" in compiled.ptx
    if READS[name]:
        assert "st.global.v4.b32" in compiled.ptx
        # A row or a tile of each tensor per program; an H200's bandwidth times its latency is about 26 KiB.
        block_bytes = 2 * (arguments["ROWS"] * arguments["BLOCK_C"] if "ROWS" in arguments else 1152)
        assert compiled.programs_per_sm() * READS[name] * block_bytes >= 26 * 1024
    # Offsets are 64-bit: no product of 32-bit integers in the program (819,200 x 4608 elements pass 2^31).
    assert not re.findall(r"arith\.muli .*: (?:tensor<[^>]*x)?i32", compiled.ttir)
