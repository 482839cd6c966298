"""A DiT's loss and gradients with every op by the Triton kernels, interpreted, against the eager specifications."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from longreel.kernels import pointwise, residual_adaln
from longreel.kernels.numerics import relative_error

pytest.importorskip("triton")

DEPTH = 2
# Launches of one block and of the final layer, by conditioning. A block is two modulations, two gated residuals (one
# of them in a modulation's kernel, but where text attention comes between), a GELU and attention, to the text as well
# in a block of `cross`; the final layer is a modulation. The gradients of what modulates are summed apart.
ATTENTION = dict.fromkeys(
    ("attention_fwd_kernel", "attention_delta_kernel", "attention_dkdv_kernel", "attention_dq_kernel"), 1
)
GELU = {"bias_gelu_fwd_kernel": 1, "bias_gelu_bwd_kernel": 1}
MODULATION = {"adaln_fwd_kernel": 1, "adaln_bwd_kernel": 1}
GATED = {"gated_residual_fwd_kernel": 1, "gated_residual_bwd_kernel": 1}
FINAL = Counter(MODULATION) + Counter({"sum_slots_kernel": 2})
BLOCK = Counter(ATTENTION) + Counter(GELU) + Counter(MODULATION) + Counter(MODULATION) + Counter(GATED)
BLOCK += Counter({"sum_slots_kernel": 7})
LAUNCHES = {"adaln": BLOCK, "in_context": BLOCK, "cross": BLOCK + Counter(GATED) + Counter(ATTENTION)}


def block_step(conditioning: str, packed: bool, provider: str) -> tuple[dict[str, Tensor], Counter[str]]:
    """Loss and gradients of one tiny model, all of whose ops run by this provider, and the launches of each kernel."""
    from triton.runtime.interpreter import InterpretedFunction

    from longreel.models.config import DiTConfig
    from longreel.models.dit import DiT
    from longreel.models.sequence import Packing, SequenceLengths
    from longreel.parallel.strategies.local import Local

    config = DiTConfig(depth=DEPTH, hidden_size=144, num_heads=2, text_dim=8, conditioning=conditioning)
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    # Two samples of five tokens, or three clips of 4, 1 and 5 in one sequence; three rows of text each.
    clips = 3 if packed else 2
    tokens = torch.randn((1, 10, config.patch_dim) if packed else (2, 5, config.patch_dim))
    coords, text = torch.randint(4, (tokens.shape[1], 3)).float(), torch.randn(clips, 3, 8)
    seq_len = 8 if conditioning == "in_context" else tokens.shape[1]
    ends = (0, 4, 5, 10)
    lengths = SequenceLengths(valid=seq_len, padded=seq_len, cu_seqlens=ends if packed else None)
    segments, text_segments = torch.tensor(ends), torch.tensor([0, 3, 6, 9])
    packing = Packing(segments=segments, video_segments=segments, text_segments=text_segments) if packed else None
    launches: Counter[str] = Counter()
    run = InterpretedFunction.run

    def counted(kernel: Any, *args: Any, **options: Any) -> Any:
        launches[kernel.fn.__name__] += 1
        return run(kernel, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", counted)
        for module in (pointwise, residual_adaln):
            patch.setattr(module, "resolve_pointwise_provider", lambda *_: provider)
        out = model(
            tokens,
            coords,
            torch.tensor([3.0, 800.0, 90.0][:clips]),
            text=text,
            sp=Local(provider=provider),
            lengths=lengths,
            packing=packing,
        )
        loss = (out * torch.randn_like(out)).sum()
        loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **named}, launches


def steps_agree(conditioning: str, packed: bool) -> tuple[float, int, dict[str, int], dict[str, int]]:
    """Largest error, number of gradients, and launches of the step by Triton and of the eager one."""
    (got, launched), (want, eager) = (block_step(conditioning, packed, provider) for provider in ("triton", "torch"))
    assert got.keys() == want.keys()
    scale = max(torch.linalg.vector_norm(t).item() for t in want.values())
    error = max(relative_error(got[name], want[name], floor=1e-3 * scale) for name in want)
    return error, len(want), dict(launched), dict(eager)


@pytest.mark.parametrize(
    ("conditioning", "packed"),
    [("adaln", False), ("cross", False), ("in_context", False), ("adaln", True), ("cross", True)],
    ids=["adaln", "cross", "in_context", "adaln-packed", "cross-packed"],
)
def test_training_step_equals_the_eager_one(run_interpreted, conditioning, packed):
    error, num_gradients, launched, eager = run_interpreted(steps_agree, conditioning, packed)
    assert error < 1e-5 and num_gradients > 20
    expected = sum([LAUNCHES[conditioning]] * DEPTH, FINAL)
    assert launched == dict(expected) and not eager
