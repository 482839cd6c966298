"""torch.library.opcheck for every op of longreel.kernels, forward and backward, by every provider that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.library import opcheck

import longreel.kernels  # noqa: F401  (registers the ops)

CU = [0, 2, 2, 5]


def tensor(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, requires_grad=grad)


def plain(*shape: int) -> Tensor:
    return tensor(*shape, grad=False)


def arguments(name: str) -> list[tuple[Any, ...]]:
    """Arguments of an op without its provider, in every form that takes another path."""
    torch.manual_seed(0)
    cu = torch.tensor(CU)
    heads, lse = (2, 5, 2, 8), (2, 2, 5)
    packed_heads = (2, 2, 3, 3, 2, 8)
    x, row = (2, 3, 8), (2, 8)
    segments, segment_row = (1, 5, 8), (3, 8)
    stats, segment_stats = (plain(2, 3), plain(2, 3)), (plain(1, 5), plain(1, 5))
    qkv = (1, 5, 3, 2, 8)
    cases = {
        "attention": [
            (tensor(*heads), tensor(2, 3, 2, 8), tensor(2, 3, 2, 8), 0.3, None, None),
            (*(tensor(1, 5, 2, 8) for _ in range(3)), 0.3, cu, cu),
        ],
        "attention_backward": [
            (plain(*heads), dlse, *(plain(*heads) for _ in range(4)), plain(*lse), 0.3, None, None)
            for dlse in (None, plain(*lse))
        ],
        "attention_packed": [(tensor(*qkv), 0.3, None), (tensor(*qkv), 0.3, cu)],
        "attention_packed_backward": [
            (plain(1, 5, 2, 8), None, plain(*qkv), plain(1, 5, 2, 8), plain(1, 2, 5), 0.3, cu)
        ],
        "adaln_modulate": [
            (tensor(*x), tensor(*row), tensor(*row), 1e-6, None),
            (tensor(*segments), tensor(*segment_row), tensor(*segment_row), 1e-6, cu),
        ],
        "adaln_modulate_backward": [
            (plain(*x), plain(*x), plain(*row), *stats, None),
            (plain(*segments), plain(*segments), plain(*segment_row), *segment_stats, cu),
        ],
        "gated_residual": [
            (tensor(*x), tensor(*x), tensor(*row), None),
            (tensor(*segments), tensor(*segments), tensor(*segment_row), cu),
        ],
        "gated_residual_backward": [
            (plain(*x), plain(*x), plain(*row), None),
            (plain(*segments), plain(*segments), plain(*segment_row), cu),
        ],
        "gated_residual_adaln": [
            (tensor(*x), tensor(*x), *(tensor(*row) for _ in range(3)), 1e-6, None),
            (tensor(*segments), tensor(*segments), *(tensor(*segment_row) for _ in range(3)), 1e-6, cu),
        ],
        "gated_residual_adaln_backward": [
            (*(plain(*x) for _ in range(4)), plain(*row), plain(*row), *stats, None),
            (*(plain(*segments) for _ in range(4)), plain(*segment_row), plain(*segment_row), *segment_stats, cu),
        ],
        "bias_gelu": [(tensor(*x), tensor(8))],
        "bias_gelu_backward": [(plain(*x), plain(*x), plain(8))],
        "merge_attention": [(tensor(*heads), tensor(*lse), tensor(*heads), tensor(*lse))],
        "merge_attention_backward": [
            (plain(*heads), dlse, plain(*heads), plain(*lse), plain(*heads), plain(*lse))
            for dlse in (None, plain(*lse))
        ],
        "sp_pack_heads": [(tensor(2, 3, 3, 4, 8), bias, 2) for bias in (None, tensor(96))]
        # Where nothing moves, an op returns storage of its own all the same.
        + [(tensor(2, 3, 3, 4, 8), None, 1)],
        "sp_pack_heads_backward": [(plain(*packed_heads),)],
        "sp_unpack_heads": [(tensor(*packed_heads),), (tensor(1, 2, 3, 3, 2, 8),)],
        "sp_pack_tokens": [(tensor(2, 5, 3, 2, 8), 2, 3), (tensor(1, 4, 3, 2, 8), 2, 2)],
        "checked_offsets": [(cu, 5), (torch.tensor([0, 9, 2, 9, 5])[::2], 5)],
        "sp_unpack_tokens": [(tensor(*packed_heads), 5), (tensor(1, 1, 3, 3, 2, 8), 3)],
    }
    return cases[name]


def kernel_ops() -> list[str]:
    """Names of all ops of longreel.kernels, without the namespace."""
    modules = {name: op._init_fn.__module__ for name, op in OPDEFS.items()}
    return sorted(n.removeprefix("longreel::") for n, m in modules.items() if m.startswith("longreel.kernels."))


def check(name: str, provider: str) -> None:
    for given in arguments(name):
        opcheck(getattr(torch.ops.longreel, name).default, (*given, provider))


@pytest.mark.parametrize("name", kernel_ops())
def test_by_torch(name):
    check(name, "torch")


@pytest.mark.parametrize("name", [n for n in kernel_ops() if n.startswith("attention")])
def test_by_sdpa_flash(name):
    check(name, "sdpa-flash")


@pytest.mark.parametrize("name", kernel_ops())
def test_by_triton(run_interpreted, name):
    run_interpreted(check, name, "triton")


@pytest.mark.parametrize("name", [n for n in kernel_ops() if n.startswith("attention")])
def test_by_triton_atomic(run_interpreted, name):
    run_interpreted(check, name, "triton-atomic")
