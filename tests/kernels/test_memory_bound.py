"""longreel.kernels.memory_bound: every op has a FLOP formula, and those that are no attention count nothing."""

from __future__ import annotations

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from longreel import kernels


def test_every_op_has_a_formula():
    names = [n for n, op in OPDEFS.items() if op._init_fn.__module__.startswith("longreel.kernels.")]
    assert {"longreel::adaln_modulate_backward", "longreel::sp_pack_heads", "longreel::merge_attention"} <= set(names)
    missing = [n for n in names if getattr(torch.ops.longreel, n.removeprefix("longreel::")) not in flop_registry]
    assert not missing


def test_memory_bound_ops_count_nothing_whoever_computes_them():
    x, y = torch.randn(2, 6, 24, requires_grad=True), torch.randn(2, 6, 24, requires_grad=True)
    rows = [torch.randn(2, 24, requires_grad=True) for _ in range(3)]
    heads, lse = torch.randn(2, 6, 4, 8, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    qkv, bias = torch.randn(2, 3, 3, 4, 8, requires_grad=True), torch.randn(96, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        outs = [
            kernels.adaln_modulate(x, *rows[:2]),
            kernels.gated_residual(x, y, rows[0]),
            *kernels.gated_residual_adaln(x, y, *rows),
            kernels.bias_gelu(x, rows[0][0]),
            *kernels.merge_attention(heads, lse, heads.detach(), lse.detach()),
            kernels.unpack_heads(kernels.pack_heads(qkv, num_ranks=2, bias=bias)),
            kernels.unpack_tokens(kernels.pack_tokens(qkv, num_ranks=2)),
        ]
        torch.stack([out.sum() for out in outs]).sum().backward()
    assert counter.get_total_flops() == 0
