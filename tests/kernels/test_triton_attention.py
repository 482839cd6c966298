"""The Triton attention kernels, interpreted on the CPU, against the definition in fp64.

fp32 and fp16 only: the interpreter's bf16 tl.dot is wrong without an error. What single cases need is in
test_triton_attention_corners.py, what a GPU does in test_triton_attention_gpu.py.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16]
PROVIDERS = ["triton", "triton-atomic"]


def _load_cases() -> Any:
    """attention_cases.py beside this file, which no path leads to."""
    spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).with_name("attention_cases.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _load_cases()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128])
def test_outputs_and_gradients_equal_the_definition(run_interpreted, head_dim, dtype):
    # A full tile and a ragged one of queries, two and a ragged one of keys; batch and heads above one.
    run_interpreted(cases.check_dense, (20, 37), 2, 2, head_dim, dtype, cases.SMALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128])
def test_atomic_backward_equals_the_definition(run_interpreted, head_dim, dtype):
    run_interpreted(
        cases.check_dense, (20, 37), 2, 2, head_dim, dtype, cases.SMALL, 0.3, None, None, None, "triton-atomic"
    )


@pytest.mark.parametrize("lengths", [(1, 1), (1, 33), (33, 1), (16, 32)], ids=["S1-T1", "S1-T33", "S33-T1", "whole"])
def test_lengths_at_the_edges(run_interpreted, lengths):
    run_interpreted(cases.check_dense, lengths, 2, 1, 72, torch.float32, cases.SMALL)


@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_tiles_of_production(run_interpreted, head_dim):
    run_interpreted(cases.check_dense, (130, 129), 1, 1, head_dim, torch.float16, None, head_dim**-0.5)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 40.0], ids=["negative", "zero", "sharp"])
def test_any_softmax_scale(run_interpreted, scale):
    run_interpreted(cases.check_dense, (17, 21), 1, 1, 8, torch.float32, cases.SMALL, scale)


# Empty segments at the start, in the middle (on either side, on both) and at the end; tiles that start anywhere.
CU_Q = [0, 0, 17, 20, 20, 20, 36, 41, 41]
CU_K = [0, 3, 36, 36, 40, 40, 41, 57, 57]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("dtype", "cu_dtype"), [(torch.float32, torch.int32), (torch.float32, torch.int64), (torch.float16, torch.int64)]
)
def test_packed_sequences(run_interpreted, dtype, cu_dtype, provider):
    run_interpreted(cases.check_dense, (41, 57), 1, 2, 72, dtype, cases.SMALL, 0.3, CU_Q, CU_K, cu_dtype, provider)


def test_one_packed_segment_is_the_whole(run_interpreted):
    run_interpreted(cases.check_dense, (18, 35), 1, 1, 8, torch.float32, cases.SMALL, 0.3, [0, 18], [0, 35])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("aligned", [True, False], ids=["strides-of-8", "odd-strides"])
@pytest.mark.parametrize("cu", [None, [0, 5, 5, 27]], ids=["batch", "packed"])
def test_packed_qkv_and_strided_views(run_interpreted, cu, aligned, provider):
    run_interpreted(cases.check_packed_qkv, cu, aligned, provider)
