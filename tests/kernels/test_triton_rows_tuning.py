"""Tiles of the memory-bound kernels: candidates that a campaign can time, constants that launches really use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from longreel import kernels
from longreel.kernels.numerics import relative_error
from longreel.kernels.triton_rows_tuning import MEASURED_ROWS, ROW_TILES, row_candidates, row_tiles

pytest.importorskip("triton")


def test_every_constant_says_what_it_rests_on():
    for tiles in [*ROW_TILES.values(), *MEASURED_ROWS.values()]:
        assert (tiles.evidence == "measured") == (tiles.record is not None)
    assert all(tiles.evidence == "measured" for tiles in MEASURED_ROWS.values())


@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("kernel", ROW_TILES)
def test_candidates_begin_with_what_is_in_use_and_differ(kernel, length):
    own, *others = row_candidates(kernel, length)
    assert own == row_tiles(kernel, 100 if length == "short" else 100_000)
    assert 2 <= len(others) <= 4
    settings = {(t.per_warp, t.num_warps, t.max_chunk) for t in (own, *others)}
    assert len(settings) == 1 + len(others)
    assert {t.evidence for t in others} == {"assumed"}


def test_what_was_measured_is_used_at_its_length(monkeypatch):
    best = replace(ROW_TILES["gelu_fwd"], per_warp=512, evidence="measured", record="abc")
    monkeypatch.setitem(MEASURED_ROWS, ("gelu_fwd", "long"), best)
    assert row_tiles("gelu_fwd", 16_384) == best
    assert row_tiles("gelu_fwd", 16_383) == ROW_TILES["gelu_fwd"]
    assert row_tiles("gelu_bwd", 16_384) == ROW_TILES["gelu_bwd"]
    assert row_candidates("gelu_fwd", "long")[0] == best
    assert {t.record for t in row_candidates("gelu_fwd", "long")[1:]} == {None}


def calls() -> dict[str, Any]:
    """op -> a call of it on few rows, small enough that more than one tile is ragged."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    x, y, rows = random(2, 37, 72), random(2, 37, 72), [random(2, 72) for _ in range(3)]
    heads, lse = [random(2, 37, 2, 72) for _ in range(2)], [random(2, 2, 37) for _ in range(2)]
    qkv, bias, packed = random(2, 37, 3, 4, 8), random(96), random(2, 2, 37, 1, 2, 8)
    return {
        "adaln": (lambda **p: kernels.adaln_modulate(x, *rows[:2], **p), (x, *rows[:2])),
        "gated_adaln": (lambda **p: kernels.gated_residual_adaln(x, y, *rows, **p), (x, y, *rows)),
        "gated": (lambda **p: kernels.gated_residual(x, y, rows[0], **p), (x, y, rows[0])),
        "gelu": (lambda **p: kernels.bias_gelu(x, rows[0][0], **p), (x, rows[0])),
        "pack": (lambda **p: kernels.pack_heads(qkv, num_ranks=2, bias=bias, **p), (qkv, bias)),
        "unpack": (lambda **p: kernels.unpack_heads(packed, **p), (packed,)),
        "merge": (lambda **p: kernels.merge_attention(heads[0], lse[0], heads[1], lse[1], **p), (*heads, *lse)),
    }


def errors_of_candidates(op: str) -> list[tuple[str, float]]:
    """In the worker: each candidate of an op's kernels against the specification, outputs and gradients."""
    call, leaves = calls()[op]

    def run(provider: str) -> list[torch.Tensor]:
        outs = call(provider=provider)
        outs = (outs,) if isinstance(outs, torch.Tensor) else outs
        douts = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)) for o in outs]
        return [*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, douts)]

    exact = run("torch")
    found = []
    for kernel in ROW_TILES:
        if kernel in (op, f"{op}_fwd", f"{op}_bwd"):
            for tiles in row_candidates(kernel, "short"):
                MEASURED_ROWS[kernel, "short"] = tiles
                error = max(relative_error(a, b) for a, b in zip(run("triton"), exact, strict=True))
                found.append((f"{kernel} {tiles}", error))
                del MEASURED_ROWS[kernel, "short"]
    return found


SLOW = [pytest.param(op, marks=pytest.mark.slow) for op in ("adaln", "gated_adaln")]


@pytest.mark.parametrize("op", [*SLOW, "gated", "gelu", "pack", "unpack", "merge"])
def test_every_candidate_computes_the_same(run_interpreted, op):
    found = run_interpreted(errors_of_candidates, op)
    assert len(found) >= 3
    for what, error in found:
        assert error < 2e-6, what
