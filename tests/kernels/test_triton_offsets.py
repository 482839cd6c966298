"""Memory-bound Triton kernels on tensors of 2^31 elements and more, interpreted, and a look at how they count programs.

The tensors are zeros but for their last rows, and only the last programs of a launch run: these rows are right if every
offset is, forward, backward, and in the sums over all rows. Memory that no program touches the system does not give.
What attention does past 2^31 elements is tested beside it; that no compiled kernel multiplies 32-bit integers, beside
each kernel's other checks of code generation.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longreel import kernels
from longreel.kernels import reference
from longreel.kernels.numerics import relative_error

pytest.importorskip("triton")

PAST = 2**31
WIDTH = 1152
TAIL = 2
# More than the programs of one chunk of rows, and than those of the second stage of a sum, which all run.
LAST_PROGRAMS = 40


def zeros_but_tail(*shape: int, dim: int = 1) -> Tensor:
    """fp16 zeros whose last TAIL rows along dim are random."""
    x = torch.zeros(shape, dtype=torch.float16)
    end = x.narrow(dim, shape[dim] - TAIL, TAIL)
    end.copy_(torch.randn(end.shape))
    return x


def tail(x: Tensor, dim: int = 1) -> Tensor:
    return x.narrow(dim, x.shape[dim] - TAIL, TAIL)


@contextmanager
def last_programs() -> Iterator[None]:
    """Launches run their last programs only; what others would have written is zero where it is summed."""
    from triton.runtime import interpreter

    from longreel.kernels import triton_rows_tuning

    def last(*bounds: int) -> range:
        if len(bounds) == 1 and bounds[0] > LAST_PROGRAMS:
            return builtins.range(bounds[0] - LAST_PROGRAMS, bounds[0])
        return builtins.range(*bounds)

    with pytest.MonkeyPatch.context() as patch:
        # The name by which the interpreter goes through the grid.
        patch.setattr(interpreter, "range", last, raising=False)
        patch.setattr(torch, "empty", torch.zeros)
        # Chunks of few rows: a program interprets them all.
        for name, tiles in triton_rows_tuning.ROW_TILES.items():
            patch.setitem(triton_rows_tuning.ROW_TILES, name, replace(tiles, max_chunk=32))
        yield


def rows_error(name: str) -> float:
    """Largest error of the last rows and of the sums over rows, of a kernel over rows."""
    from longreel.kernels import triton_adaln, triton_gelu, triton_residual

    torch.manual_seed(0)
    x = zeros_but_tail(1, PAST // WIDTH + TAIL, WIDTH)
    gate, shift, scale = (torch.randn(1, WIDTH).half() for _ in range(3))
    mean, rstd = zeros_but_tail(1, x.shape[1]).float(), 1 + zeros_but_tail(1, x.shape[1]).float()
    module, rest = {
        "adaln_modulate_fwd": (triton_adaln, (shift, scale, 1e-6, None)),
        "adaln_modulate_bwd": (triton_adaln, (x, scale, mean, rstd, None)),
        "gated_residual_fwd": (triton_residual, (x, gate, None)),
        "gated_residual_bwd": (triton_residual, (x, gate, None)),
        "gated_residual_adaln_fwd": (triton_adaln, (x, gate, shift, scale, 1e-6, None)),
        "gated_residual_adaln_bwd": (triton_adaln, (x, x, x, gate, scale, mean, rstd, None)),
        "bias_gelu_fwd": (triton_gelu, (shift[0],)),
        "bias_gelu_bwd": (triton_gelu, (x, shift[0])),
    }[name]
    with last_programs():
        got = getattr(module, name)(x, *rest)

    def end(t: Tensor) -> Tensor:
        return tail(t) if t.shape[1:2] == x.shape[1:2] else t

    want = getattr(reference, name)(*(end(t).double() if isinstance(t, Tensor) else t for t in (x, *rest)))
    pairs = zip(*((t,) if isinstance(t, Tensor) else t for t in (got, want)), strict=True)
    return max(relative_error(end(a), b) for a, b in pairs)


def merge_error(name: str) -> float:
    """As rows_error, of the merge of partial attention: [B, S, H, D] with S H D past 2^31."""
    from longreel.kernels import triton_lse_merge

    torch.manual_seed(0)
    seq_len = PAST // (2 * 72) + TAIL
    out1, out2 = (zeros_but_tail(1, seq_len, 2, 72) for _ in range(2))
    lse1, lse2 = (zeros_but_tail(1, 2, seq_len, dim=2).float() for _ in range(2))
    given = [out1, lse1, out2, lse2] if name.endswith("fwd") else [out2, lse1, out1, lse1, out2, lse2]
    with last_programs():
        got = getattr(triton_lse_merge, name)(*given)
    want = getattr(reference, name)(*(tail(t, 1 if t.dim() == 4 else 2).double() for t in given))
    return max(relative_error(tail(a, 1 if a.dim() == 4 else 2), b) for a, b in zip(got, want, strict=True))


def layout_error(name: str) -> float:
    """As rows_error, of a layout change between two ranks of two heads of 72 each."""
    from longreel.kernels import triton_sp_layout

    torch.manual_seed(0)
    launch, specification = getattr(triton_sp_layout, name), getattr(reference, name)
    if "heads" in name:
        tokens = PAST // (4 * 72) + TAIL
        x, bias = zeros_but_tail(1, tokens, 1, 4, 72), torch.randn(4 * 72).half()
        packed = zeros_but_tail(2, 1, tokens, 1, 2, 72, dim=2)
    else:
        # Two samples, and one token less than the ranks have rows.
        rows = PAST // (2 * 2 * 2 * 72) + TAIL
        x, packed = zeros_but_tail(2, 2 * rows - 1, 1, 2, 72), zeros_but_tail(2, 2, rows, 1, 2, 72, dim=2)
    with last_programs():
        if name == "sp_pack_heads_fwd":
            return relative_error(tail(launch(x, bias, 2)[1]), specification(tail(x).double(), bias.double(), 2)[1])
        if name == "sp_unpack_heads_fwd":
            return relative_error(tail(launch(packed)), specification(tail(packed, 2)))
        if name == "sp_pack_heads_bwd":
            (dx, dbias), want = launch(packed), specification(tail(packed, 2).double())
            return max(relative_error(tail(dx), want[0]), relative_error(dbias, want[1]))
        if name == "sp_pack_tokens_fwd":
            ends = launch(x, 2, rows)[1, 1, -3:]
            return relative_error(ends, torch.cat((tail(x)[1], torch.zeros_like(ends[:1]))))
        return relative_error(launch(packed, 2 * rows - 1)[1, -1:], packed[1, 1, -2:-1])


def atomic_error(name: str) -> float:
    """As rows_error, of dq of `triton-atomic`, whose workspace [B, H, S, D] is past 2^31 elements: by batch."""
    from longreel.kernels import triton_attention_atomic

    torch.manual_seed(0)
    # What is read but for the end lies in memory that nobody wrote: zeros that the system does not give.
    batch = PAST // (16 * 8) + TAIL
    q, k, v, out, dout = (torch.empty(batch, 16, 1, 8, dtype=torch.float16) for _ in range(5))
    for t in (q, k, v, dout):
        tail(t, 0).copy_(torch.randn(TAIL, 16, 1, 8))
    lse = torch.empty(batch, 1, 16)
    ends = [tail(t, 0).double() for t in (q, k, v)]
    want_out, want_lse = reference.attention_fwd(*ends, 0.3, None, None)
    tail(out, 0).copy_(want_out)
    tail(lse, 0).copy_(want_lse)
    with last_programs():
        got = getattr(triton_attention_atomic, name)(dout, None, q, k, v, out, lse, 0.3, None, None)
    end = tail(dout, 0).double(), None, *ends, want_out, want_lse, 0.3, None, None
    return max(relative_error(tail(a, 0), b) for a, b in zip(got, reference.attention_bwd(*end), strict=True))


OPS = ("adaln_modulate", "gated_residual", "gated_residual_adaln", "bias_gelu")
ROWS = [f"{op}_{way}" for op in OPS for way in ("fwd", "bwd")]
LAYOUTS = [
    "sp_pack_heads_fwd",
    "sp_pack_heads_bwd",
    "sp_unpack_heads_fwd",
    "sp_pack_tokens_fwd",
    "sp_unpack_tokens_fwd",
]
# To go through memory takes the others up to a minute.
QUICK = {"gated_residual_fwd"}
CASES = [
    *((rows_error, name) for name in ROWS),
    *((merge_error, f"merge_attention_{way}") for way in ("fwd", "bwd")),
    *((layout_error, name) for name in LAYOUTS),
    (atomic_error, "attention_bwd"),
]


@pytest.mark.parametrize(
    ("error_of", "name"),
    [pytest.param(*case, id=case[1], marks=() if case[1] in QUICK else pytest.mark.slow) for case in CASES],
)
def test_offsets_pass_31_bits(run_interpreted, error_of, name):
    assert run_interpreted(error_of, name) < 2e-3


def narrow_program_ids(source: str) -> list[int]:
    """Lines on which a program id is used without being cast to 64 bits on the spot."""
    tree = ast.parse(source)
    cast = {
        id(node.func.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to"
        if [ast.unparse(argument) for argument in node.args] == ["tl.int64"]
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.program_id", "tl.num_programs")
        if id(node) not in cast
    ]


def test_program_ids_are_64_bit():
    folder = Path(kernels.__file__).parent
    sources = [p for p in sorted(folder.glob("triton_*.py")) if not p.name.startswith("triton_attention")]
    assert len(sources) >= 6
    assert {p.name: lines for p in sources if (lines := narrow_program_ids(p.read_text()))} == {}
    assert narrow_program_ids("a = tl.program_id(0) * C\nb = tl.program_id(0).to(tl.int64) * C") == [1]
