"""Sums over ranks in bf16 runs: one large term, then terms that an accumulator of the inputs' dtype would lose.

One token per rank. A query's own key weighs some 300 times as much as each of the others, so that sums over ranks begin
with a large number of the rank's own, to which seven small ones are added, each below half a unit in the last place. In
fp32 a sum errs by the rounding of its terms and its own; in bf16 by all seven. The gradients of the projection and of x
are summed a second time with the large term where FastSeq's backward by chunks begins: rank r with the token of r + 1,
and with what the heads of r - 1 owe its own token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longreel.models.sequence import SequenceLengths
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.strategies import Local, build_strategy

RANKS, HEADS, HEAD_DIM = 8, 8, 32
WIDTH = HEADS * HEAD_DIM
# One rounding to bf16 is 2^-8 at most; the losses are of 2^-7 and more, but for 0.94 of it under usp.
BOUND = 1.5 * 2**-8
# Columns of x: which rank's token it is, what only dW sees, what only dX sees; the latter two from the neighbour too.
TOKEN, FOR_DW, FOR_DX, NEXT_DW, NEXT_DX = 0, 32, 40, 48, 56
# Numbers of v in a head: the token's own place among 8 makes a sum of out stagnate, another among 8 is what the
# gradients of q and k come of, one carries the gradient of v alone, and two that of the bias of v alone, the large term
# from the own token and from the next.
OUT, SCORES, PLAIN, BIAS, NEXT_BIAS = 0, 8, 16, 17, 18
LARGE = 512.0
# A token's gradient of v is 0.98 of it where it is the large one, which leaves a unit of 4, and 1.7 elsewhere.
LARGE_BIAS = 528.0

FORMS: dict[str, dict[str, Any]] = {
    "ulysses": {"strategy": "ulysses"},
    "ulysses-lean": {"strategy": "ulysses", "policy": "keep_attention"},
    "ring": {"strategy": "ring"},
    "usp": {"strategy": "usp", "ulysses_degree": 2},
    "fastseq-projection": {"strategy": "fastseq", "fastseq_overlap": "projection"},
    "fastseq-attention": {"strategy": "fastseq", "fastseq_overlap": "attention"},
    "fastseq-kept": {"strategy": "fastseq", "fastseq_overlap": "projection", "fastseq_keep_gathered": True},
    "fastseq-lean": {"strategy": "fastseq", "fastseq_overlap": "projection", "policy": "keep_attention"},
}


def own_and_others(own: float, other: float) -> Tensor:
    """[8, 8]: a row per token."""
    return torch.full((RANKS, RANKS), other).fill_diagonal_(own)


def layer_inputs() -> tuple[Tensor, nn.Linear, Tensor]:
    """x [1, 8, C], the projection, and the gradient of the output; all of them exact in bf16."""
    x = torch.zeros(1, RANKS, WIDTH)
    x[0, :, TOKEN : TOKEN + RANKS] = torch.eye(RANKS)
    x[0, :, FOR_DW : FOR_DW + RANKS] = own_and_others(LARGE, 1.0)
    x[0, :, NEXT_DW : NEXT_DW + RANKS] = own_and_others(LARGE, 1.0).roll(1, 0)
    qkv = nn.Linear(WIDTH, 3 * WIDTH)
    with torch.no_grad():
        qkv.weight.zero_()
        qkv.bias.zero_()
        # [H, D, C]; a column of a token holds what it is projected to.
        q, k, v = qkv.weight.view(3, HEADS, HEAD_DIM, WIDTH)
        q[:, :RANKS, TOKEN : TOKEN + RANKS] = own_and_others(0.5, -0.5 / 64)
        k[:, :RANKS, TOKEN : TOKEN + RANKS] = own_and_others(64.0, -1.0)
        v[:, OUT : OUT + RANKS, TOKEN : TOKEN + RANKS] = own_and_others(1.0, 2.0)
        v[:, SCORES : SCORES + RANKS, TOKEN : TOKEN + RANKS] = own_and_others(0.0, 2.0)
        v[:, PLAIN, FOR_DX : FOR_DX + RANKS] = own_and_others(LARGE, 1.0)
        v[:, PLAIN, NEXT_DX : NEXT_DX + RANKS] = own_and_others(LARGE, 1.0).roll(1, 1)
    dout = torch.zeros(1, RANKS, HEADS, HEAD_DIM)
    dout[0, :, :, SCORES : SCORES + RANKS] = torch.eye(RANKS).unsqueeze(1)
    dout[..., PLAIN] = 1.0625
    # [token, head].
    dout[0, :, :, BIAS] = own_and_others(LARGE_BIAS, 0.0)
    dout[0, :, :, NEXT_BIAS] = own_and_others(LARGE_BIAS, 0.0).roll(1, 0)
    return x, qkv, dout.flatten(2)


def sums(options: dict[str, Any] | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The sums of one layer that stagnate in half precision; on one device without options."""
    x, qkv, dout = (value.to(dtype) for value in layer_inputs())
    if options is None:
        sp: Any = Local(provider="torch")
    else:
        config = ParallelConfig(sp_degree=RANKS, attention_provider="torch", **options)
        sp = build_strategy(config, build_mesh(sp_degree=RANKS, ulysses_degree=config.ulysses_degree))
    lengths = SequenceLengths(valid=RANKS, padded=RANKS)
    x = sp.shard(x, 1).detach().requires_grad_()
    out = sp.self_attention(x, qkv, num_heads=HEADS, lengths=lengths)
    out.backward(sp.shard(dout, 1))
    # Beyond this point nothing is rounded any more.
    out, dx, dw, dbias = (value.detach().double() for value in (out, x.grad, qkv.weight.grad, qkv.bias.grad))
    if options is not None:
        parts = [torch.zeros(1, RANKS, WIDTH, dtype=torch.float64) for _ in range(2)]
        for whole, part in zip(parts, (out, dx), strict=True):
            whole[:, dist.get_rank()] = part[:, 0]
            dist.all_reduce(whole)
        out, dx = parts
        dist.all_reduce(dw)
        dist.all_reduce(dbias)
    dq, dk, dv = dw.view(3, HEADS, HEAD_DIM, WIDTH)
    return {
        "out": out.unflatten(2, (HEADS, HEAD_DIM))[0, :, :, OUT : OUT + RANKS].diagonal(dim1=0, dim2=2),
        "dq": dq[:, :RANKS, TOKEN : TOKEN + RANKS].diagonal(dim1=1, dim2=2),
        "dk": dk[:, :RANKS, TOKEN : TOKEN + RANKS].diagonal(dim1=1, dim2=2),
        "dv": dv[:, PLAIN, TOKEN : TOKEN + RANKS],
        "dw": dv[:, PLAIN, FOR_DW : FOR_DW + RANKS].diagonal(),
        "dw-next": dv[:, PLAIN, NEXT_DW : NEXT_DW + RANKS].diagonal(),
        "dx": dx[0, :, FOR_DX : FOR_DX + RANKS].diagonal(),
        "dx-next": dx[0, :, NEXT_DX : NEXT_DX + RANKS].diagonal(),
        "dbias": dbias.view(3, HEADS, HEAD_DIM)[2, :, BIAS : NEXT_BIAS + 1],
    }


def worst_errors(options: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of each sum in bf16."""
    exact, found = sums(None, torch.float64), sums(options, torch.bfloat16)
    return {name: ((found[name] - exact[name]) / exact[name]).abs().max().item() for name in exact}


@pytest.mark.parametrize("form", FORMS)
def test_bf16_sums_over_eight_ranks_lose_no_small_terms(run_distributed, form):
    for errors in run_distributed(worst_errors, RANKS, FORMS[form]):
        assert all(error <= BOUND for error in errors.values()), errors
