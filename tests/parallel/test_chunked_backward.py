"""longreel.parallel.strategies.chunked_backward: the gradients of the whole layer, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longreel.kernels.numerics import PARALLEL_TOLERANCE, relative_error
from longreel.parallel.mesh import build_mesh
from longreel.parallel.strategies.chunked_backward import attend_project_backward

ROWS, WIDTH, HEADS_PER_RANK, HEAD_DIM, SCALE = 4, 12, 2, 4, 0.5


def definition(x: Tensor, weight: Tensor, bias: Tensor, offsets: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, P s, 3, H, D], out [B, S, H, D] and lse [B, H, S] of the existing tokens."""
    qkv = F.linear(x, weight, bias).unflatten(2, (3, -1, HEAD_DIM))
    q, k, v = qkv[:, : offsets[-1]].transpose(1, 3).unbind(2)
    segment = torch.bucketize(torch.arange(offsets[-1]), torch.tensor(offsets[1:]), right=True)
    scores = ((q @ k.mT) * SCALE).masked_fill(segment[:, None] != segment, float("-inf"))
    return qkv, (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def errors(offsets: list[int], batch: int, dtype: torch.dtype, kept: bool) -> list[float]:
    """Of dX of this rank's tokens, and of dW and the gradient of the bias, summed over the ranks."""
    size, rank = dist.get_world_size(), dist.get_rank()
    num_heads = HEADS_PER_RANK * size
    torch.manual_seed(0)
    leaves = [
        torch.randn(batch, size * ROWS, WIDTH, dtype=torch.float64),
        torch.randn(3 * num_heads * HEAD_DIM, WIDTH, dtype=torch.float64) / WIDTH**0.5,
        torch.randn(3 * num_heads * HEAD_DIM, dtype=torch.float64),
    ]
    # Exact in the tested dtype, and rows of padding that must reach nothing.
    x, weight, bias = (leaf.to(dtype).double().requires_grad_() for leaf in leaves)
    qkv, out, lse = definition(x, weight, bias, offsets)
    dout = torch.randn(batch, size * ROWS, num_heads, HEAD_DIM).to(dtype).double()
    dout[:, offsets[-1] :] = 7.0
    expected = torch.autograd.grad((out * dout[:, : offsets[-1]]).sum(), (x, weight, bias))

    own = slice(rank * HEADS_PER_RANK, (rank + 1) * HEADS_PER_RANK)
    chunks = x.detach().to(dtype).unflatten(1, (size, ROWS)).transpose(0, 1).contiguous()
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    dx, dweight, dbias = attend_project_backward(
        dout[:, :, own].to(dtype),
        qkv.detach()[:, :, :, own].to(dtype),
        out.detach()[:, :, own].to(dtype),
        lse.detach()[:, own].to(lse_dtype),
        chunks[rank],
        weight.detach().to(dtype),
        num_heads,
        offsets,
        SCALE,
        "torch",
        build_mesh(sp_degree=size).sp_group,
        gathered=chunks if kept else None,
    )
    assert (dx.dtype, dweight.dtype, dbias.dtype) == (dtype,) * 3
    found = [dx.double(), dweight.double(), dbias.double()]
    for share in found[1:]:
        dist.all_reduce(share)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    wanted = [expected[0][:, mine], *expected[1:]]
    # A rank of padding has no gradient.
    assert bool(wanted[0].any()) or not bool(found[0].any())
    return [relative_error(a, b) if bool(b.any()) else 0.0 for a, b in zip(found, wanted, strict=True)]


def lengths(size: int) -> dict[str, list[int]]:
    whole = size * ROWS
    return {
        "whole": [0, whole],
        "odd": [0, whole - 1],
        "padding": [0, ROWS + 1],
        "packed": [0, 3, 4, whole - 3, whole - 2],
    }


@pytest.mark.parametrize("kind", ["whole", "odd", "padding", "packed"])
@pytest.mark.parametrize("size", [2, 3, 5, 7], ids=lambda p: f"P{p}")
def test_gradients_are_those_of_the_whole_layer(run_distributed, size, kind):
    batch = 1 if kind == "packed" else 2
    for found in run_distributed(errors, size, lengths(size)[kind], batch, torch.float64, kind == "odd"):
        assert max(found) <= PARALLEL_TOLERANCE[torch.float64]


@pytest.mark.parametrize("kind", ["odd", "packed"])
def test_bf16_errs_by_the_rounding_of_its_tensors(run_distributed, kind):
    # Inputs of attention's backward, its results, the shares of dX and dW and their sums are rounded: a few times 2^-9.
    for found in run_distributed(errors, 5, lengths(5)[kind], 1, torch.bfloat16, False):
        assert max(found) <= 4 * 2**-8
