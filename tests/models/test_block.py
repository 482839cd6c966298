"""models/block.py against the block's equations, written again with torch's own layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longreel.models.sequence import SequenceLengths


def plain_block(block, x: Tensor, c: Tensor, text: Tensor | None, text_only: bool) -> Tensor:
    def modulate(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def heads(x):
        return x.unflatten(-1, (3, -1)).transpose(1, 2)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)

    def attend_text(x):
        k, v = block.cross.kv(text).chunk(2, dim=-1)
        return block.cross.proj(attend(block.cross.q(x), k, v))

    # Order of the original release: shift, scale and gate of the attention, then of the MLP.
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.modulation(F.silu(c)).unflatten(-1, (6, -1)).unbind(1)
    modulated = modulate(x, shift_a, scale_a)
    if text_only:
        x = x + gate_a[:, None] * attend_text(modulated)
    else:
        x = x + gate_a[:, None] * block.proj(attend(*block.qkv(modulated).chunk(3, dim=-1)))
        if text is not None:
            x = x + attend_text(x)
    hidden = F.gelu(block.fc1(modulate(x, shift_m, scale_m)), approximate="tanh")
    return x + gate_m[:, None] * block.fc2(hidden)


@pytest.mark.parametrize(
    "fields",
    [
        {"conditioning": "adaln"},
        {"conditioning": "in_context"},
        {"conditioning": "cross"},
        {"conditioning": "cross", "cross_layout": "published"},
        {"conditioning": "cross", "text_only": True},
    ],
    ids=["adaln", "in-context", "cross", "cross-published", "text-only"],
)
def test_block_and_its_gradients_equal_the_equations(make_model, local_sp, fields):
    block = make_model(**fields).blocks[0]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.3)
    x = torch.randn(2, 11, 48, dtype=torch.float64, requires_grad=True)
    c = torch.randn(2, 48, dtype=torch.float64, requires_grad=True)
    text = torch.randn(2, 5, 48, dtype=torch.float64, requires_grad=True) if "cross" in fields.values() else None
    weight = torch.randn(2, 11, 48, dtype=torch.float64)

    inputs = [t for t in (x, c, text, *block.parameters()) if t is not None]
    text_lengths = SequenceLengths(valid=5, padded=5)
    ours = block(x, c, text, sp=local_sp, lengths=SequenceLengths(valid=11, padded=11), text_lengths=text_lengths)
    expected = plain_block(block, x, c, text, fields.get("text_only", False))
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)

    grads = torch.autograd.grad(ours, inputs, weight)
    expected_grads = torch.autograd.grad(expected, inputs, weight)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-9)


def test_text_attention_without_text_is_an_error(make_model, local_sp):
    block = make_model(conditioning="cross").blocks[0]
    x, c = torch.zeros(1, 4, 48, dtype=torch.float64), torch.zeros(1, 48, dtype=torch.float64)
    with pytest.raises(ValueError, match="text is missing"):
        block(x, c, None, sp=local_sp, lengths=SequenceLengths(valid=4, padded=4))
