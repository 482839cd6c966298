"""Launches of the Triton attention kernels as data: what is refused before there is one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")


def refusals() -> list[str]:
    from longreel.kernels import attention

    found = []
    for dtype in (torch.bfloat16, torch.float16):
        q = torch.ones(1, 4, 1, 16, dtype=dtype)
        try:
            attention(q, q, q, provider="triton")
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def test_interpreter_refuses_bf16_and_takes_fp16(run_interpreted):
    refused, taken = run_interpreted(refusals)
    assert "q has dtype torch.bfloat16" in refused
    assert "use torch.float16 or torch.float32" in refused
    assert taken == ""
