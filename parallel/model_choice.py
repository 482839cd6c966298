"""Which DiT a run trains: data only, also the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longreel.models.config import Conditioning, CrossLayout, DiTConfig, preset

# Patches where none are given: of pixels, which are many, and of latents, which are few.
PIXEL_PATCH = (2, 4, 4)
LATENT_PATCH = (1, 2, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """Which DiT to train.

    Args:
        dit: name of a size (`dit-s-2` ... `dit-xl-4`), whose depth, width and heads then count; without one the three
            below do, a model small enough for a CPU.
        depth: number of blocks.
        hidden_size: width of the model.
        num_heads: attention heads.
        patch_size: (frames, height, width) of one patch in pixels or latent elements; 2 4 4 of pixels and 1 2 2 of
            latents if not given. A patch of more numbers than the model is wide cannot be predicted exactly.
        conditioning: how the caption enters: `adaln`, `cross` or `in_context`.
        text_only: leave self-attention out; needs conditioning `cross`.
        cross_layout: text attention on `replicated` text, or as `published`: heads split, text tokens sharded.
        position_gain: what the position embedding is scaled by; about 4 where a clip is few patches, see DiTConfig.
    """

    dit: str | None = None
    depth: int = 2
    hidden_size: int = 128
    num_heads: int = 4
    patch_size: tuple[int, int, int] | None = None
    conditioning: Conditioning = "cross"
    text_only: bool = False
    cross_layout: CrossLayout = "replicated"
    position_gain: float = 1.0

    def __post_init__(self) -> None:
        for name in ("depth", "hidden_size", "num_heads"):
            check_at_least(self, name, 1)
        if self.dit is not None:
            for name in ("depth", "hidden_size", "num_heads"):
                if (value := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(
                        f"{name} {value} has no effect with dit {self.dit!r}, whose own counts; leave one of them out"
                    )
        self.build()

    def build(
        self,
        *,
        in_channels: int = 3,
        raw: bool = True,
        learn_sigma: bool = False,
        text_dim: int = 128,
        max_text_tokens: int = 48,
    ) -> DiTConfig:
        """The model's configuration.

        Args:
            in_channels: of the space it is trained in. raw: whether that is pixels.
            learn_sigma: as the objective says. text_dim, max_text_tokens: of the text encoder.

        Raises:
            ValueError: an unknown size, or sizes that do not fit.
        """
        shared: dict[str, Any] = {
            "patch_size": tuple(self.patch_size or (PIXEL_PATCH if raw else LATENT_PATCH)),
            "in_channels": in_channels,
            "learn_sigma": learn_sigma,
            "conditioning": self.conditioning,
            "text_only": self.text_only,
            "cross_layout": self.cross_layout,
            "text_dim": text_dim,
            "max_text_tokens": max_text_tokens,
            "position_gain": self.position_gain,
        }
        if self.dit is not None:
            return preset(self.dit, **shared)
        return DiTConfig(depth=self.depth, hidden_size=self.hidden_size, num_heads=self.num_heads, **shared)


def check_at_least(config: object, name: str, least: float) -> None:
    """ValueError unless a number of a configuration is at least that, and below what PyTorch can hold."""
    value = getattr(config, name)
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    # PyTorch answers larger sizes with a TypeError and a stack of its own.
    if value >= 2**31:
        raise ValueError(f"{name} must be below 2**31, got {value}")
