"""Configuration of the DiT and its presets: data only, checked on construction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Conditioning = Literal["adaln", "cross", "in_context"]
CrossLayout = Literal["replicated", "published"]
PositionEmbedding = Literal["3d", "2d"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig:
    """Architecture of a video DiT over latents [B, T, H, W, C_in].

    Args:
        depth: number of transformer blocks.
        hidden_size: width C; must be a multiple of num_heads.
        num_heads: attention heads; head_dim = hidden_size / num_heads must be a multiple of 8, at most 128.
        mlp_ratio: MLP hidden width over hidden_size.
        patch_size: (frames, height, width) of one 3-D patch, in latent elements.
        in_channels: C_in, latent (or pixel) channels.
        learn_sigma: predict a variance beside the mean: 2 * C_in output channels.
        conditioning: `adaln` (pooled text joins the timestep), `cross` (self-attention and text attention in each
            block) or `in_context` (text tokens are part of the sequence).
        text_only: leave self-attention out (the published regime); needs conditioning `cross`.
        cross_layout: `replicated` (every rank holds all text keys and values; no communication) or `published`
            (heads split and text tokens sharded, as the code behind the published table did).
        text_dim: width of the text features handed in.
        max_text_tokens: L, text tokens per sample.
        num_classes: class labels of the class-conditioned form; 0 for none. One more row is the null class.
        position: sin-cos position embedding, `3d` over (t, h, w), or `2d` over (h, w) as the original image DiT.
        position_gain: what the position embedding is scaled by. Few patches differ in few of its channels, and what
            blocks add to the residual stream drowns that: small grids train many times faster at 4 than at 1.
    """

    depth: int
    hidden_size: int
    num_heads: int
    mlp_ratio: float = 4.0
    patch_size: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 4
    learn_sigma: bool = False
    conditioning: Conditioning = "adaln"
    text_only: bool = False
    cross_layout: CrossLayout = "replicated"
    text_dim: int = 256
    max_text_tokens: int = 64
    num_classes: int = 0
    position: PositionEmbedding = "3d"
    position_gain: float = 1.0

    def __post_init__(self) -> None:
        for name in ("depth", "hidden_size", "num_heads", "in_channels", "text_dim", "max_text_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.position_gain < math.inf:
            raise ValueError(f"position_gain must be positive and finite, got {self.position_gain}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be 0 (none) or more, got {self.num_classes}")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size must be three positive sizes (frames, height, width), got {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.head_dim % 8 or self.head_dim > 128:
            raise ValueError(
                f"head_dim = hidden_size / num_heads = {self.hidden_size} / {self.num_heads} = {self.head_dim}; "
                "it must be a multiple of 8 and at most 128"
            )
        for name, kind in (
            ("conditioning", Conditioning),
            ("cross_layout", CrossLayout),
            ("position", PositionEmbedding),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")
        if self.text_only and self.conditioning != "cross":
            raise ValueError(
                f"text_only leaves only the text attention, and conditioning {self.conditioning!r} has none: "
                "nothing would attend. Use conditioning 'cross', or text_only=False"
            )
        if self.cross_layout == "published" and self.conditioning != "cross":
            raise ValueError(
                f"cross_layout 'published' splits the cross attention, and conditioning {self.conditioning!r} has "
                "none; use conditioning 'cross', or cross_layout 'replicated'"
            )

    @property
    def head_dim(self) -> int:
        """D = hidden_size / num_heads."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: C_in, twice that with learn_sigma."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def patch_dim(self) -> int:
        """Elements of one input patch."""
        t, h, w = self.patch_size
        return t * h * w * self.in_channels

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Patch grid (t, h, w) of a latent video; ValueError names the size that does not divide."""
        sizes = {"num_frames": num_frames, "height": height, "width": width}
        for (name, size), patch in zip(sizes.items(), self.patch_size, strict=True):
            if size < 1 or size % patch:
                raise ValueError(f"{name} = {size} is not a positive multiple of the patch size {patch}")
        t, h, w = self.patch_size
        return num_frames // t, height // h, width // w


def _preset(depth: int, hidden_size: int, num_heads: int, patch: int) -> Callable[..., DiTConfig]:
    def build(**overrides: object) -> DiTConfig:
        fields: dict[str, object] = {
            "depth": depth,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "patch_size": (1, patch, patch),
        }
        return DiTConfig(**(fields | overrides))  # type: ignore[arg-type]

    build.__doc__ = (
        f"DiT with depth {depth}, hidden {hidden_size}, {num_heads} heads, patch (1, {patch}, {patch}); "
        "keyword arguments override fields."
    )
    return build


dit_s_2 = _preset(12, 384, 6, 2)
dit_s_4 = _preset(12, 384, 6, 4)
dit_b_2 = _preset(12, 768, 12, 2)
dit_b_4 = _preset(12, 768, 12, 4)
dit_l_2 = _preset(24, 1024, 16, 2)
dit_l_4 = _preset(24, 1024, 16, 4)
dit_xl_2 = _preset(28, 1152, 16, 2)
dit_xl_4 = _preset(28, 1152, 16, 4)

PRESETS: dict[str, Callable[..., DiTConfig]] = {
    "dit-s-2": dit_s_2,
    "dit-s-4": dit_s_4,
    "dit-b-2": dit_b_2,
    "dit-b-4": dit_b_4,
    "dit-l-2": dit_l_2,
    "dit-l-4": dit_l_4,
    "dit-xl-2": dit_xl_2,
    "dit-xl-4": dit_xl_4,
}


def preset(name: str, **overrides: object) -> DiTConfig:
    """The named preset with fields overridden; ValueError lists the names that exist."""
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}; presets are {', '.join(PRESETS)}")
    return PRESETS[name](**overrides)
