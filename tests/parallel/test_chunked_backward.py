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


def wrong_of_exact_terms() -> tuple[int, int, int]:
    """Numbers of dX, dW and the bias's gradient in bf16 that are not the roundings of exact sums, on this rank.

    Every query weighs all 16 keys alike and numbers are integers: gradients of v are exact in bf16, shares of dX by
    rank and of dW by chunk are rounded once, as the layer rounds them. A sum in fp32 adds no error to them.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    rows, num_heads = 16 // size, HEADS_PER_RANK * size
    torch.manual_seed(0)
    x = torch.randint(-8, 9, (1, 16, WIDTH)).double()
    weight = torch.randint(-8, 9, (3, num_heads * HEAD_DIM, WIDTH)).double()
    weight[:2] = 0
    dout = 16 * torch.randint(5, 16, (1, 16, num_heads, HEAD_DIM)).double()
    qkv, out, lse = definition(x, weight.flatten(0, 1), torch.zeros(weight[..., 0].numel()).double(), [0, 16])

    def rounded(value: Tensor) -> Tensor:
        return value.bfloat16().double()

    # Of every rank's heads: [P, 16, h D], the same at each of the tokens, and [P, h D, C].
    dv = (dout.sum(1) / 16).view(size, 1, -1).expand(-1, 16, -1)
    by_rank = weight[2].view(size, -1, WIDTH)
    mine, own = slice(rank * rows, (rank + 1) * rows), slice(rank * HEADS_PER_RANK, (rank + 1) * HEADS_PER_RANK)
    by_chunk = dv[rank].unflatten(0, (size, rows)).mT @ x[0].unflatten(0, (size, rows))
    expected = rounded(dv[:, mine] @ by_rank).sum(0), rounded(by_chunk).sum(0), dv[rank].sum(0)

    dx, dweight, dbias = attend_project_backward(
        dout[:, :, own].bfloat16(),
        qkv[:, :, :, own].bfloat16(),
        out[:, :, own].bfloat16(),
        lse[:, own].float(),
        x[:, mine].bfloat16(),
        weight.flatten(0, 1).bfloat16(),
        num_heads,
        [0, 16],
        SCALE,
        "torch",
        build_mesh(sp_degree=size).sp_group,
    )
    found = dx[0], dweight.view(3, size, -1, WIDTH)[2, rank], dbias.view(3, size, -1)[2, rank]
    dx_wrong, dweight_wrong, dbias_wrong = (
        int((a != b.bfloat16()).sum()) for a, b in zip(found, expected, strict=True)
    )
    return dx_wrong, dweight_wrong, dbias_wrong


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
        assert all(error <= PARALLEL_TOLERANCE[torch.float64] for error in found), found


@pytest.mark.parametrize("kind", ["odd", "packed"])
def test_bf16_errs_by_the_rounding_of_its_tensors(run_distributed, kind):
    # Inputs of attention's backward, its results, the shares of dX and dW and their sums are rounded: a few times 2^-9.
    for found in run_distributed(errors, 5, lengths(5)[kind], 1, torch.bfloat16, False):
        assert all(error <= 4 * 2**-8 for error in found), found


def test_bf16_sums_are_exact_where_their_terms_are(run_distributed):
    assert run_distributed(wrong_of_exact_terms, 4) == [(0, 0, 0)] * 4
