"""A single-device strategy for the model's tests, and models whose zero-initialised layers are not zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longreel.kernels import attention
from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.models.sequence import AttentionShape, SequenceLengths, Traffic


@dataclass
class LocalSP:
    """The protocol on one device: padding is cut off keys and values by length. Counts its calls."""

    degree: int = 1
    provider: str = "torch"
    calls: list[str] = field(default_factory=list)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        return x

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        return x

    def self_attention(self, x: Tensor, qkv: nn.Linear, *, num_heads: int, lengths: SequenceLengths) -> Tensor:
        self.calls.append("self_attention")
        assert x.shape[1] == lengths.padded
        q, k, v = F.linear(x, qkv.weight, qkv.bias).view(*x.shape[:2], 3, num_heads, -1).unbind(2)
        out, _ = attention(q, k[:, : lengths.valid], v[:, : lengths.valid], provider=self.provider)
        return out.flatten(2)

    def cross_attention(
        self,
        x: Tensor,
        text: Tensor,
        q: nn.Linear,
        kv: nn.Linear,
        *,
        num_heads: int,
        lengths: SequenceLengths,
        text_lengths: SequenceLengths,
    ) -> Tensor:
        self.calls.append("cross_attention")
        keys, values = kv(text[:, : text_lengths.valid]).unflatten(-1, (2, num_heads, -1)).unbind(2)
        out, _ = attention(q(x).unflatten(-1, (num_heads, -1)), keys, values, provider=self.provider)
        return out.flatten(2)

    def traffic(self, shape: AttentionShape) -> Traffic:
        return Traffic()


def randomise_zeros(model: nn.Module, seed: int = 0, std: float = 0.05) -> None:
    """Randomise every all-zero parameter (gates, biases, last layers): no gradient is zero by design then."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)


@pytest.fixture(autouse=True)
def _one_thread_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def local_sp() -> LocalSP:
    return LocalSP()


@pytest.fixture
def make_model() -> Callable[..., DiT]:
    """Builds a small DiT in fp64 with randomised gates; keyword arguments override the configuration."""

    def build(dtype: torch.dtype = torch.float64, **overrides: object) -> DiT:
        fields: dict[str, object] = {
            "depth": 2,
            "hidden_size": 48,
            "num_heads": 3,
            "in_channels": 3,
            "text_dim": 20,
            "max_text_tokens": 7,
        }
        model = DiT(DiTConfig(**(fields | overrides))).to(dtype)  # type: ignore[arg-type]
        randomise_zeros(model)
        return model

    return build
