"""longreel.kernels.triton_common and triton_aot: where kernels may run, and what a compiled one uses."""

from __future__ import annotations

import pytest
import torch

from longreel.kernels import attention
from longreel.kernels.triton_common import interpreting, require_triton

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def scale_kernel(x, y, size, factor, BLOCK: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < size
    tl.store(y + o_x, tl.load(x + o_x, mask=m_x) * factor, mask=m_x)


def scaled_by_interpreter(values: list[float]) -> tuple[bool, list[float]]:
    require_triton(torch.device("cpu"))
    x = torch.tensor(values)
    y = torch.empty_like(x)
    scale_kernel[(2,)](x, y, x.numel(), 3.0, BLOCK=4)
    return interpreting(), y.tolist()


def test_kernels_are_interpreted_in_the_worker(run_interpreted):
    assert run_interpreted(scaled_by_interpreter, [1.0, 2.0, 4.0, 8.0, 16.0]) == (True, [3.0, 6.0, 12.0, 24.0, 48.0])


def test_cpu_without_interpreter_is_refused_with_the_reason():
    assert not interpreting()
    require_triton(torch.device("cuda"))
    with pytest.raises(ValueError, match="needs a CUDA device, got tensors on cpu; set TRITON_INTERPRET=1"):
        require_triton(torch.device("cpu"))


def test_the_message_names_the_provider_that_was_asked_for():
    q = torch.randn(1, 8, 2, 72).bfloat16()
    with pytest.raises(ValueError, match=r"provider 'triton-atomic' needs a CUDA device, .* or use provider torch"):
        attention(q, q, q, provider="triton-atomic")
    with pytest.raises(
        ValueError, match="provider 'triton-hopper' needs a CUDA device, a Hopper GPU, got tensors on cpu"
    ) as raised:
        attention(q, q, q, provider="triton-hopper")
    assert "TRITON_INTERPRET" not in str(raised.value)


def test_compiles_without_a_gpu(compile_kernel):
    arguments = {"x": torch.float32, "y": torch.float32, "size": 2048, "factor": 3.0, "BLOCK": 1024}
    compiled = compile_kernel(scale_kernel, arguments, num_warps=4)
    assert 8 <= compiled.registers <= 64
    assert compiled.local_bytes == compiled.spills == compiled.shared_bytes == 0
    assert compiled.programs_per_sm() == 16
    assert "ld.global.v4.b32" in compiled.ptx
    assert "sm_90" in compiled.ptx
    assert "LDG.E.128" in compiled.sass
    # The size's divisibility is what made whole vectors safe.
    odd = compile_kernel(scale_kernel, arguments | {"size": 2047}, num_warps=4)
    assert "ld.global.v4.b32" not in odd.ptx
    with pytest.raises(ValueError, match="missing or unknown: \\['BLOCK'\\]"):
        compile_kernel(scale_kernel, {name: arguments[name] for name in ("x", "y", "size", "factor")})
