"""What the tests of the Triton attention kernels share: inputs, the definition, and the bar their results are held to.

The files of tests get it from the fixture attention_cases; its check_* run in the interpreter's process.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from longreel.kernels import attention, attention_packed
from longreel.kernels.numerics import KERNEL_ERROR_FACTOR, relative_error

NAMES = ("out", "lse", "dq", "dk", "dv")
# (block_m, block_n) that give several tiles, full and ragged, at short lengths; None is what a launch would use.
SMALL = (16, 16)


@contextlib.contextmanager
def conditions(tiles: tuple[int, int] | None) -> Iterator[None]:
    """Outputs start as NaN, and tiles have the given shape."""
    from longreel.kernels import triton_attention_tuning as tuning

    def poison(make):
        def made(*args, **options):
            tensor = make(*args, **options)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return made

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "empty_like", poison(torch.empty_like)))
        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty)))
        if tiles is not None:
            chosen = tuning.AttentionTiles(
                block_m=tiles[0], block_n=tiles[1], num_warps=4, num_stages=1, planned_programs=1
            )
            stack.enter_context(mock.patch.object(tuning, "attention_tiles", return_value=chosen))
        yield


def make(lengths: tuple[int, ...], batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, n, heads, head_dim).to(dtype).requires_grad_() for n in lengths]


def definition(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v), scores.logsumexp(-1)


def segments_of(fn, cu_q: list[int] | None, cu_k: list[int] | None):
    """fn on each packed segment that has rows on both sides; out 0 and lse -inf elsewhere."""
    if cu_q is None or cu_k is None:
        return fn

    def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for (a, b), (c, d) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
            if b > a and d > c:
                out, lse = fn(q[:, a:b], k[:, c:d], v[:, c:d])
            else:
                out = q[:, a:b] * 0
                lse = q.new_full((1, q.shape[2], b - a), -math.inf)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, 1), torch.cat(lses, 2)

    return packed


def results(fn, tensors: list[Tensor]) -> list[Tensor]:
    """out, lse, and gradients of a random functional of both; rows without keys take no part in it."""
    out, lse = fn(*tensors)
    torch.manual_seed(1)
    w_out, w_lse = torch.randn(out.shape).to(out.dtype), torch.randn(lse.shape).to(lse.dtype)
    loss = (out * w_out).sum() + (lse * w_lse)[lse.detach() > -math.inf].sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)]


def distance(value: Tensor, exact: Tensor) -> float:
    finite = exact > -math.inf
    return (value[finite].double() - exact[finite]).norm().item()


def hold_to_the_bar(
    got: list[Tensor],
    eager: list[Tensor],
    exact: list[Tensor],
    dtype: torch.dtype,
    names: tuple[str, ...] = NAMES,
    largest_score: float = 1.0,
) -> None:
    """Every result within the bar.

    Args:
        largest_score: where scores are large, their size. Backward computes them again as transposed products, which a
            BLAS may sum in another order: an ulp of a score is this many of P, and eager's sums need not have it.
    """
    for name, a, e, b in zip(names, got, eager, exact, strict=True):
        if name == "lse":
            assert torch.equal(a == -math.inf, b == -math.inf)
            a, e, b = (t.masked_fill(t == -math.inf, 0.0) for t in (a, e, b))
        # dq and dk of a single key are zero but for rounding: measure them against the size of dv.
        floor = torch.linalg.vector_norm(exact[-1].double()).item() if name.startswith("d") else 0.0
        allowed = KERNEL_ERROR_FACTOR * relative_error(e, b, floor) + (1 + largest_score) * torch.finfo(dtype).eps
        error = relative_error(a, b, floor)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check_dense(
    lengths: tuple[int, int],
    batch: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    tiles: tuple[int, int] | None,
    scale: float = 0.3,
    cu_q: list[int] | None = None,
    cu_k: list[int] | None = None,
    cu_dtype: torch.dtype = torch.int64,
    provider: str = "triton",
) -> None:
    inputs = make((lengths[0], lengths[1], lengths[1]), batch, heads, head_dim, dtype)
    offsets = {}
    if cu_q is not None:
        offsets = {f"cu_seqlens_{s}": torch.tensor(c, dtype=cu_dtype) for s, c in (("q", cu_q), ("k", cu_k))}
    with conditions(tiles):
        got = results(lambda *x: attention(*x, softmax_scale=scale, provider=provider, **offsets), inputs)
    wanted = segments_of(lambda *x: definition(*x, scale), cu_q, cu_k)
    exact = results(wanted, [t.detach().double().requires_grad_() for t in inputs])
    eager = results(wanted, inputs)
    if dtype == torch.float32:
        # The same computation, P recomputed from a rounded lse, in eager PyTorch: autograd keeps P, and at a single key
        # or at large scores its error is smaller than any recomputation's.
        again = results(lambda *x: attention(*x, softmax_scale=scale, provider="torch", **offsets), inputs)
        eager = [max(pair, key=lambda x: distance(x, b)) for *pair, b in zip(eager, again, exact, strict=True)]
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    # Below 10 the bar stays as it is.
    largest = exact[1][exact[1] > -math.inf].abs().max().item()
    hold_to_the_bar(got, eager, exact, dtype, largest_score=largest if largest > 10 else 1.0)


def check_packed_qkv(cu: list[int] | None, aligned: bool, provider: str = "triton") -> None:
    torch.manual_seed(0)
    # Rows of a wider buffer: strides that are not those of a contiguous tensor, nor multiples of 8 if not aligned.
    wide = torch.randn(1 if cu else 2, 31, 3, 2, 40 if aligned else 43)[:, 2:29, :, :, :40]
    qkv = wide.requires_grad_()
    offsets = None if cu is None else torch.tensor(cu)
    with conditions(SMALL):
        packed = results(lambda x: attention_packed(x, cu_seqlens=offsets, provider=provider), [qkv])
        cu_both = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        views = results(lambda x: attention(*x.unbind(2), provider=provider, **cu_both), [qkv])
    wanted = segments_of(lambda *x: definition(*x, 40**-0.5), cu, cu)
    exact = results(lambda x: wanted(*x.unbind(2)), [qkv.detach().double().requires_grad_()])
    eager = results(lambda x: wanted(*x.unbind(2)), [qkv])
    for got in (packed, views):
        hold_to_the_bar(got, eager, exact, torch.float32, ("out", "lse", "dqkv"))
    for a, b in zip(packed, views, strict=True):
        assert torch.equal(a, b)
