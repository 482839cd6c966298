"""The strategies' custom ops by torch.library.opcheck: fake implementations, autograd, no mutation."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck

from longreel.parallel.mesh import build_mesh
from longreel.parallel.strategies.exchange import exchange_attention_op
from longreel.parallel.strategies.fastseq_attention import fastseq_attention_op


def check_ops() -> None:
    group = build_mesh(sp_degree=dist.get_world_size()).sp_group
    torch.manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    common = (0.3, "torch", group)
    qkv, cross = tensor(2, 3, 3, 4, 8), (tensor(2, 3, 1, 4, 8), tensor(32), tensor(2, 2, 2, 4, 8), tensor(64))
    spreads = ((group, "", False, 1), (group, "", False, 2), (group, "", True, 2), ("", group, True, 1))
    for heads_group, ring_group, lean, chunks in spreads:
        spread = (0.3, "torch", heads_group, ring_group, lean, chunks)
        opcheck(exchange_attention_op, (qkv, tensor(96), None, None, [0, 5], [0, 5], *spread))
        opcheck(exchange_attention_op, (qkv, None, None, None, [0, 5], [0, 5], *spread))
        opcheck(exchange_attention_op, (*cross, [0, 5], [0, 3], *spread))
    x, text = tensor(2, 3, 32), tensor(2, 2, 32)
    for lean in (False, True):
        none = (None, None, None)
        opcheck(
            fastseq_attention_op,
            (x, tensor(96, 32), tensor(96), *none, 4, [0, 5], [0, 5], *common, lean, lean, not lean),
        )
    cross = (tensor(32, 32), tensor(32), text, tensor(64, 32), tensor(64))
    opcheck(fastseq_attention_op, (x, *cross, 4, [0, 5], [0, 3], *common, False, False, True))


def test_ops_pass_opcheck(run_distributed):
    run_distributed(check_ops, 2, timeout=240)
