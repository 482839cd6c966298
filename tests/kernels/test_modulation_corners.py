"""Modulation where a grid of shapes does not look: segments without tokens, and statistics of what was rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longreel.kernels import adaln_modulate, gated_residual, gated_residual_adaln

# Op, tensors of tokens, rows of modulation.
OPS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "adaln": (adaln_modulate, 1, 2),
    "gated": (gated_residual, 2, 1),
    "fused": (gated_residual_adaln, 2, 3),
}
# Clips of a batch on a rank that holds tokens of some of them, of one of them, of none.
SEGMENTS = {
    "some": [0, 0, 3, 3, 3, 7, 7],
    "first": [0, 5, 5, 5],
    "last": [0, 0, 0, 5],
    "none": [0, 0, 0, 0],
}


def with_grads(fn: Callable[..., Any], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    outs = fn(*inputs)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    grads = torch.autograd.grad(outs, inputs, [torch.ones_like(out) for out in outs])
    return [out.detach() for out in outs], list(grads)


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **options: Any) -> Tensor:
        tensor = make(*args, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return made


def check_empty_segments(
    name: str, bounds: list[int], dtype: torch.dtype, cu_dtype: torch.dtype, provider: str
) -> None:
    op, num_tokens, num_rows = OPS[name]
    torch.manual_seed(0)
    cu_seqlens = torch.tensor(bounds, dtype=cu_dtype)
    tokens = [torch.randn(1, bounds[-1], 40).to(dtype).requires_grad_() for _ in range(num_tokens)]
    rows = [torch.randn(len(bounds) - 1, 40).to(dtype).requires_grad_() for _ in range(num_rows)]
    empty = cu_seqlens.diff() == 0
    with pytest.MonkeyPatch.context() as patch:
        # A gradient that nobody wrote would show.
        for owner, attribute in ((torch, "empty"), (Tensor, "new_empty")):
            patch.setattr(owner, attribute, poisoned(getattr(owner, attribute)))
        outs, grads = with_grads(lambda *t: op(*t, cu_seqlens=cu_seqlens, provider=provider), [*tokens, *rows])
    for grad in grads[num_tokens:]:
        assert torch.equal(grad[empty], torch.zeros_like(grad[empty]))
        assert grad[~empty].isfinite().all() and (grad[~empty] != 0).any(-1).all()

    # The other rows get what they get where the clips without tokens are not listed at all.
    if not bounds[-1]:
        assert [out.shape for out in outs] == [tokens[0].shape] * len(outs)
        return
    kept = torch.tensor([0, *cu_seqlens[1:][~empty].tolist()], dtype=cu_dtype)
    others = [*tokens, *(row.detach()[~empty].requires_grad_() for row in rows)]
    want_outs, want_grads = with_grads(lambda *t: op(*t, cu_seqlens=kept, provider=provider), others)
    got = [*outs, *grads[:num_tokens], *(grad[~empty] for grad in grads[num_tokens:])]
    for a, b in zip(got, [*want_outs, *want_grads], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bounds", SEGMENTS)
@pytest.mark.parametrize("name", OPS)
def test_segments_without_tokens_get_zero_gradients(name, bounds):
    for cu_dtype in (torch.int32, torch.int64):
        check_empty_segments(name, SEGMENTS[bounds], torch.float32, cu_dtype, "torch")


@pytest.mark.parametrize("bounds", SEGMENTS)
@pytest.mark.parametrize("name", OPS)
def test_segments_without_tokens_get_zero_gradients_by_triton(run_interpreted, name, bounds):
    dtype = torch.float16 if bounds == "some" else torch.float32
    run_interpreted(check_empty_segments, name, SEGMENTS[bounds], dtype, torch.int32, "triton")


def check_statistics_of_the_rounded_sum(provider: str) -> None:
    # 1500 + y rounds to 1500 in half precision for |y| < 0.5: rows of one value, which have no spread to normalise.
    x = torch.full((1, 3, 40), 1500.0, dtype=torch.float16)
    y = torch.linspace(-0.4, 0.4, 120, dtype=torch.float16).view(1, 3, 40)
    shift, scale = torch.randn(2, 1, 40).half()
    z, modulated = gated_residual_adaln(x, y, torch.ones_like(shift), shift, scale, provider=provider)
    assert torch.equal(z, x)
    assert torch.equal(modulated, shift.unsqueeze(1).expand_as(x))
    _, _, mean, rstd = torch.ops.longreel.gated_residual_adaln(
        x, y, torch.ones_like(shift), shift, scale, 1e-6, None, provider
    )
    assert torch.equal(mean, torch.full_like(mean, 1500.0)) and torch.allclose(rstd, torch.full_like(rstd, 1000.0))


def test_statistics_are_those_of_the_rounded_sum():
    check_statistics_of_the_rounded_sum("torch")


def test_statistics_are_those_of_the_rounded_sum_by_triton(run_interpreted):
    run_interpreted(check_statistics_of_the_rounded_sum, "triton")
