"""The Triton attention kernels over the grid of widths and layouts, interpreted: what the tests by one width leave out.

For every head_dim one packed, strided, poisoned batch with segments of one token, of none and of odd lengths, one whose
queries and keys are packed differently, and one of single queries; outputs, every gradient and that of the lse, in fp32
and fp16, against the definition in fp64.
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
# Keys of the same segments: more than there are queries, one where there is none, as many.
KEY_BOUNDS = [0, 5, 6, 23, 30]


def definition(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v), scores.logsumexp(-1)


def by_segments(q: Tensor, k: Tensor, v: Tensor, key_bounds: list[int]) -> tuple[Tensor, Tensor]:
    spans = zip(itertools.pairwise(BOUNDS), itertools.pairwise(key_bounds), strict=True)
    parts = [definition(q[:, a:b], k[:, c:d], v[:, c:d]) for (a, b), (c, d) in spans if b > a]
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)


def results(fn: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    """out, lse and the gradients of both together."""
    out, lse = fn(*inputs)
    torch.manual_seed(1)
    upstream = [torch.randn(t.shape, dtype=torch.float16).to(t) for t in (out, lse)]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], inputs, upstream)]


def strided(*shape: int, dtype: torch.dtype) -> Tensor:
    """A part of a larger tensor, two rows in and eight columns short of it."""
    length, head_dim = shape[1], shape[-1]
    wide = torch.randn(shape[0], length + 4, *shape[2:-1], head_dim + 8).to(dtype)
    return wide[:, 2 : length + 2, ..., :head_dim].requires_grad_()


def errors(case: str, head_dim: int, dtype: torch.dtype, provider: str) -> list[tuple[float, float]]:
    """(error of Triton, error of eager) against fp64; the latter by autograd or by the specification, if larger."""
    torch.manual_seed(0)
    providers = (provider, "torch")
    cu_q, cu_k = torch.tensor(BOUNDS), torch.tensor(KEY_BOUNDS)
    if case == "packed":
        inputs = [strided(1, 19, 3, 2, head_dim, dtype=dtype)]
        exact = lambda x: by_segments(*x.unbind(2), BOUNDS)  # noqa: E731
        ops = [lambda x, p=p: attention_packed(x, cu_seqlens=cu_q, provider=p) for p in providers]
    elif case == "packed-cross":
        inputs = [strided(1, length, 2, head_dim, dtype=dtype) for length in (19, 30, 30)]
        exact = lambda *x: by_segments(*x, KEY_BOUNDS)  # noqa: E731
        ops = [lambda *x, p=p: attention(*x, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, provider=p) for p in providers]
    else:
        inputs = [torch.randn(3, s, 2, head_dim).to(dtype).requires_grad_() for s in (1, 19, 19)]
        exact = definition
        ops = [lambda *x, p=p: attention(*x, provider=p) for p in providers]
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
@pytest.mark.parametrize(
    ("case", "provider"),
    [("packed", "triton"), ("packed", "triton-atomic"), ("packed-cross", "triton"), ("S1", "triton")]
    + [pytest.param(case, "triton-atomic", marks=pytest.mark.slow) for case in ("packed-cross", "S1")],
)
def test_within_the_bar(run_interpreted, case, provider, head_dim, dtype):
    for got, allowed in run_interpreted(errors, case, head_dim, dtype, provider):
        assert got <= KERNEL_ERROR_FACTOR * allowed + 2 * torch.finfo(dtype).eps
