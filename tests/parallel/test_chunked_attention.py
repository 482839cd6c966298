"""longreel.parallel.strategies.chunked_attention: the attention of the whole sequence, whatever arrives when."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longreel.parallel.mesh import build_mesh
from longreel.parallel.strategies.chunked_attention import gather_project_attend

BATCH, ROWS, WIDTH, HEADS = 1, 6, 16, 2


def dense(qkv: Tensor, offsets: list[int]) -> tuple[Tensor, Tensor]:
    """out [B, S, h, D] and lse [B, h, S] by the definition."""
    q, k, v = qkv[:, : offsets[-1]].transpose(1, 3).unbind(2)
    segment = torch.bucketize(torch.arange(offsets[-1]), torch.tensor(offsets[1:]), right=True)
    scores = (q @ k.mT) * 0.5
    scores = scores.masked_fill(segment[:, None] != segment, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def errors(offsets: list[int], keep_qkv: bool) -> tuple[float, float, float]:
    """Largest error of out, lse and q_heads (0 where they are not kept) on this rank."""
    size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    x = torch.randn(BATCH, size * ROWS, WIDTH, dtype=torch.float64)
    weight, bias = torch.randn(3 * HEADS * 4, WIDTH, dtype=torch.float64), torch.randn(3 * HEADS * 4).double()
    own = x[:, rank * ROWS : (rank + 1) * ROWS].contiguous()
    group = build_mesh(sp_degree=size).sp_group
    q_heads, out, lse = gather_project_attend(own, weight, bias, HEADS, offsets, 0.5, "torch", group, keep_qkv=keep_qkv)
    expected = F.linear(x, weight, bias).view(BATCH, size * ROWS, 3, HEADS, 4)
    expected[:, offsets[-1] :] = 0
    expected_out, expected_lse = dense(expected, offsets)
    kept = float((q_heads - expected).abs().max()) if keep_qkv else 0.0
    return float((out - expected_out).abs().max()), float((lse - expected_lse).abs().max()), kept


@pytest.mark.parametrize(
    ("offsets", "keep_qkv"),
    [
        pytest.param([0, 24], True, id="whole"),
        # Tokens lie in the order of arrival here, which nobody sees where they are not kept.
        pytest.param([0, 24], False, id="whole-lean"),
        pytest.param([0, 20], True, id="padded"),
        pytest.param([0, 20], False, id="padded-lean"),
        pytest.param([0, 5], True, id="ranks-of-padding"),
        pytest.param([0, 12], True, id="half-of-padding"),
        # Most pairs of ranges share no clip.
        pytest.param([0, 5, 6, 13, 24], True, id="packed"),
        pytest.param([0, 6, 12, 18, 24], True, id="a-clip-a-rank"),
        pytest.param([0, 8, 8, 21], True, id="packed-padded"),
    ],
)
def test_it_is_the_attention_of_the_whole_sequence(run_distributed, offsets, keep_qkv):
    for found in run_distributed(errors, 4, offsets, keep_qkv):
        # Each for itself: the largest of a NaN and a number may be the number.
        assert all(error < 1e-12 for error in found), found
