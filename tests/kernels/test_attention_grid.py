"""The Triton attention kernels over the grid of widths and layouts, interpreted: what the tests by one width leave out.

For every head_dim one packed, strided, poisoned batch with segments of one token, of none and of odd lengths, and one
of single queries; outputs, every gradient and that of the lse, in fp32 and fp16, against the definition in fp64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longreel.kernels import attention, attention_packed
from longreel.kernels.numerics import KERNEL_ERROR_FACTOR, relative_error

pytest.importorskip("triton")

HEAD_DIMS = (8, 40, 64, 72, 96, 128)
BOUNDS = [0, 1, 1, 12, 19]


def definition(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v), scores.logsumexp(-1)


def by_segments(qkv: Tensor) -> tuple[Tensor, Tensor]:
    parts = [definition(*qkv[:, a:b].unbind(2)) for a, b in itertools.pairwise(BOUNDS) if b > a]
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)


def results(fn: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    """out, lse and the gradients of both together."""
    out, lse = fn(*inputs)
    torch.manual_seed(1)
    upstream = [torch.randn(t.shape, dtype=torch.float16).to(t) for t in (out, lse)]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], inputs, upstream)]


def errors(case: str, head_dim: int, dtype: torch.dtype) -> list[tuple[float, float]]:
    """(error of Triton, error of eager) against fp64; the latter by autograd or by the specification, if larger."""
    torch.manual_seed(0)
    if case == "packed":
        inputs = [torch.randn(1, 23, 4, 2, head_dim + 8).to(dtype)[:, 2:21, :3, :, :head_dim].requires_grad_()]
        exact = by_segments
        ops = [
            lambda x, p=p: attention_packed(x, cu_seqlens=torch.tensor(BOUNDS), provider=p) for p in ("triton", "torch")
        ]
    else:
        inputs = [torch.randn(3, s, 2, head_dim).to(dtype).requires_grad_() for s in (1, 19, 19)]
        exact = definition
        ops = [lambda *x, p=p: attention(*x, provider=p) for p in ("triton", "torch")]
    real, real_like = Tensor.new_empty, torch.empty_like
    with pytest.MonkeyPatch.context() as patch:

        def poison(t: Tensor) -> Tensor:
            return t.fill_(math.nan) if t.is_floating_point() else t

        patch.setattr(Tensor, "new_empty", lambda *a, **k: poison(real(*a, **k)))
        patch.setattr(torch, "empty_like", lambda *a, **k: poison(real_like(*a, **k)))
        got = results(ops[0], inputs)
    eager, specified = results(exact, inputs), results(ops[1], inputs)
    want = results(exact, [t.detach().double().requires_grad_() for t in inputs])
    # The gradient of a query or key beside a single key is zero but for rounding: take the largest gradient's size.
    floor = max(torch.linalg.vector_norm(t.double()).item() for t in want[2:])
    return [
        (relative_error(a, w, f), max(relative_error(e, w, f), relative_error(r, w, f)))
        for a, e, r, w, f in zip(got, eager, specified, want, [0.0, 0.0] + [floor] * len(inputs), strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("case", ["packed", "S1"])
def test_within_the_bar(run_interpreted, case, head_dim, dtype):
    for got, allowed in run_interpreted(errors, case, head_dim, dtype):
        assert got <= KERNEL_ERROR_FACTOR * allowed + 2 * torch.finfo(dtype).eps
