"""A DiT's loss and gradients with every op by the Triton kernels, interpreted, against the eager specifications."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longreel.kernels import pointwise, residual_adaln
from longreel.kernels.numerics import relative_error

pytest.importorskip("triton")


def block_step(conditioning: str, provider: str) -> dict[str, Tensor]:
    """Loss and gradients of one tiny model, all of whose ops run by this provider."""
    from longreel.models.config import DiTConfig
    from longreel.models.dit import DiT
    from longreel.models.sequence import SequenceLengths
    from longreel.parallel.strategies.local import Local

    config = DiTConfig(depth=2, hidden_size=144, num_heads=2, text_dim=8, conditioning=conditioning)
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens, coords = torch.randn(2, 5, config.patch_dim), torch.randint(4, (5, 3)).float()
    text = torch.randn(2, 3, 8)
    seq_len = 8 if conditioning == "in_context" else 5
    with pytest.MonkeyPatch.context() as patch:
        for module in (pointwise, residual_adaln):
            patch.setattr(module, "resolve_pointwise_provider", lambda *_: provider)
        out = model(
            tokens,
            coords,
            torch.tensor([3.0, 800.0]),
            text=text,
            sp=Local(provider=provider),
            lengths=SequenceLengths(valid=seq_len, padded=seq_len),
        )
        loss = (out * torch.randn_like(out)).sum()
        loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **named}


def steps_agree(conditioning: str) -> tuple[float, int]:
    got, want = block_step(conditioning, "triton"), block_step(conditioning, "torch")
    assert got.keys() == want.keys()
    scale = max(torch.linalg.vector_norm(t).item() for t in want.values())
    return max(relative_error(got[name], want[name], floor=1e-3 * scale) for name in want), len(want)


@pytest.mark.parametrize("conditioning", ["adaln", "cross", "in_context"])
def test_training_step_equals_the_eager_one(run_interpreted, conditioning):
    error, num_gradients = run_interpreted(steps_agree, conditioning)
    assert error < 1e-5 and num_gradients > 20
