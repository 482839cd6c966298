"""longreel.kernels.triton_rows: which segment a row is in, how rows are shared out, and what modulation allocates."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from longreel.kernels import adaln_modulate, gated_residual, gated_residual_adaln

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from longreel.kernels.triton_rows import segment_of_row  # noqa: E402

# Of 11 rows: empty segments at the start, in the middle, twice in a row, at the end; one segment; one row each.
BOUNDS = [
    [0, 11],
    [0, 4, 11],
    [0, 0, 11],
    [0, 11, 11],
    [0, 0, 0, 3, 3, 3, 4, 11, 11, 11],
    [0, 1, 2, 9, 11],
    list(range(12)),
]


@triton.jit
def segment_kernel(found, cu_seqlens, seq_len, num_segments):
    row = tl.program_id(0).to(tl.int64)
    tl.store(found + row, segment_of_row(cu_seqlens, row, seq_len, num_segments))


def segments_of_rows(bounds: list[int] | None, dtype: torch.dtype) -> list[int]:
    found = torch.full((12,), -1)
    offsets = None if bounds is None else torch.tensor(bounds, dtype=dtype)
    num_segments = 3 if bounds is None else len(bounds) - 1
    segment_kernel[(11 if bounds else 12,)](found, offsets, 4, num_segments)
    return found.tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_every_row_is_found_in_the_segment_that_holds_it(run_interpreted, bounds, dtype):
    # A program that began one segment early would visit it in vain, write a slot that is another's, and end right by
    # luck of the order that programs run in.
    spans = enumerate(itertools.pairwise(bounds))
    want = [n for n, (start, end) in spans for _ in range(start, end)]
    assert run_interpreted(segments_of_rows, bounds, dtype) == [*want, -1]


def test_samples_are_segments_of_one_length(run_interpreted):
    assert run_interpreted(segments_of_rows, None, torch.int64) == [0] * 4 + [1] * 4 + [2] * 4


def allocated_by(name: str) -> tuple[list[int], list[int], int]:
    """Elements of every tensor that an op with modulation by segment allocates: forward, then backward."""
    from longreel.kernels import triton_rows

    tokens, columns = 96, 8
    x, y = (torch.randn(1, tokens, columns, requires_grad=True) for _ in range(2))
    rows = [torch.randn(3, columns, requires_grad=True) for _ in range(3)]
    bounds = torch.tensor([0, 10, 64, 96])
    sizes: list[int] = []

    def counting(real: Any) -> Any:
        def make(*args: Any, **options: Any) -> Tensor:
            tensor = real(*args, **options)
            sizes.append(tensor.numel())
            return tensor

        return make

    calls = {
        "adaln": lambda: adaln_modulate(x, *rows[:2], cu_seqlens=bounds, provider="triton"),
        "gated": lambda: gated_residual(x, y, rows[0], cu_seqlens=bounds, provider="triton"),
        "fused": lambda: gated_residual_adaln(x, y, *rows, cu_seqlens=bounds, provider="triton"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_rows, "MIN_PROGRAMS", 1)
        for owner, attribute in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, attribute, counting(getattr(owner, attribute)))
        outs = calls[name]()
        forward, sizes = sizes[:], []
        outs = (outs,) if isinstance(outs, Tensor) else outs
        torch.autograd.backward(outs, [torch.ones(out.shape) for out in outs])
    return forward, sizes, tokens * columns


@pytest.mark.parametrize(("name", "outputs"), [("adaln", (1, 1)), ("gated", (1, 1)), ("fused", (2, 2))])
def test_modulation_is_never_expanded_to_tokens(run_interpreted, name, outputs):
    forward, backward, elements = run_interpreted(allocated_by, name)
    for sizes, count in ((forward, outputs[0]), (backward, outputs[1])):
        assert sizes.count(elements) == count
        # Besides: statistics [S], gradients [N, C] and slots [programs + N, C].
        assert sum(size for size in sizes if size != elements) < elements


def test_columns_are_split_with_little_waste():
    from longreel.kernels.triton_rows import split_columns

    assert [split_columns(c) for c in (1152, 72, 64, 1)] == [(1024, 128), (64, 8), (32, 32), (1, 1)]
    for columns in range(1, 5000):
        main, tail = split_columns(columns)
        assert columns <= main + tail and main + tail < 2 * columns + 1 and main & (main - 1) == tail & (tail - 1) == 0


def test_programs_hold_whole_tiles_and_are_many(monkeypatch):
    from longreel.kernels import triton_rows

    monkeypatch.setattr(triton_rows, "MIN_PROGRAMS", 1000)
    assert [triton_rows.rows_per_program(rows, 256) for rows in (1, 1000, 4096, 10**9)] == [1, 1, 4, 256]
    assert triton_rows.rows_per_program(4096, 256, 9, 32) == 32
    assert triton_rows.rows_per_program(100_000, 256, 9, 32) == 256
    assert triton_rows.rows_per_program(100_000, 64, 9, 32) == 64
