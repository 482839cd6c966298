"""A whole DiT block under torch.compile: one graph under every strategy, and the bits of eager mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longreel.models.block import DiTBlock
from longreel.models.config import DiTConfig
from longreel.models.sequence import Packing, SequenceLengths
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.strategies import build_strategy

WIDTH, HEADS, TEXT, DEGREE = 64, 8, 6, 2
FORMS: dict[str, dict[str, Any]] = {
    "ulysses": {"strategy": "ulysses"},
    "ulysses-chunks": {"strategy": "ulysses", "head_chunks": 2},
    "fastseq-projection": {"strategy": "fastseq", "fastseq_overlap": "projection"},
    "fastseq-attention": {"strategy": "fastseq", "fastseq_overlap": "attention"},
    "ring": {"strategy": "ring"},
    "usp": {"strategy": "usp", "ulysses_degree": 2},
}


def block_differences(options: dict[str, Any], kind: str) -> list[str]:
    """Names of the results of a block, output and gradients, whose bits a compiled one changes; on this rank."""
    packed = kind == "packed"
    config = ParallelConfig(sp_degree=DEGREE, attention_provider="torch", **options)
    sp = build_strategy(config, build_mesh(sp_degree=DEGREE, ulysses_degree=config.ulysses_degree))
    torch.manual_seed(0)
    block = DiTBlock(
        DiTConfig(depth=1, hidden_size=WIDTH, num_heads=HEADS, mlp_ratio=2.0, conditioning="cross", text_dim=16)
    )
    # Zero gates would leave attention without gradients.
    nn.init.normal_(block.modulation.weight, std=0.1)
    block.mlp_tile = 3 if kind == "tiled" else None
    rows, clips = 7, 2 if packed else 1
    lengths = SequenceLengths(valid=13, padded=14, cu_seqlens=(0, 5, 13) if packed else None)
    packing = None
    if packed:
        segments = torch.tensor([0, 5, 7] if sp.shard(torch.arange(14), 0)[0] == 0 else [0, 0, 7])
        packing = Packing(segments=segments, video_segments=segments, text_segments=torch.arange(clips + 1) * TEXT)
    whole = torch.randn(1, 14, WIDTH)
    c, text = torch.randn(clips, WIDTH), torch.randn(clips, TEXT, WIDTH)

    def call(x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        return block(x, c, text, sp=sp, lengths=lengths, packing=packing)

    # Workers live on from test to test, and compile one function a few times only.
    torch.compiler.reset()
    results = []
    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        block.zero_grad()
        leaves = [t.detach().clone().requires_grad_() for t in (sp.shard(whole, 1), c, text)]
        out = run(*leaves)
        assert out.shape == (1, rows, WIDTH)
        out.square().sum().backward()
        named = {name: p.grad for name, p in block.named_parameters()}
        named |= dict(zip(("x", "c", "text"), (leaf.grad for leaf in leaves), strict=True))
        results.append({"out": out.detach()} | named)
    eager, compiled = results
    assert all(grad is not None and grad.any() for grad in eager.values())
    return [name for name in eager if not torch.equal(eager[name], compiled[name])]


KINDS = ["plain", "packed", "tiled", "lean"]
# One kind of each, and each kind; all of them with `-m slow`.
DEFAULT = {
    ("ulysses", "tiled"),
    ("ulysses-chunks", "lean"),
    ("fastseq-projection", "lean"),
    ("fastseq-attention", "packed"),
    ("ring", "packed"),
    ("usp", "plain"),
}


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        pytest.param(form, kind, marks=() if (form, kind) in DEFAULT else pytest.mark.slow)
        for form in FORMS
        for kind in KINDS
    ],
)
def test_a_compiled_block_is_one_graph_with_the_bits_of_eager_mode(run_distributed, form, kind):
    options = FORMS[form] | ({"policy": "keep_attention"} if kind == "lean" else {})
    for differing in run_distributed(block_differences, DEGREE, options, kind, timeout=240):
        assert differing == []
