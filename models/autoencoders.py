"""Compression of videos: one interface over raw pixels, our VQ-VAE and Stable Diffusion's VAE.

| name | latents of [B, T, H, W, 3] | needs |
| --- | --- | --- |
| `raw` | the pixels themselves | nothing |
| `vqvae` | [B, T / ft, H / fs, W / fs, C] | a folder written by data/train_vqvae.py |
| `sd-vae` | [B, T, H / 8, W / 8, 4] (as its config says) | a diffusers AutoencoderKL: local folder or hub name |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

AutoencoderName = Literal["raw", "vqvae", "sd-vae"]
WeightDtype = Literal["fp32", "fp16", "bf16"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Autoencoder(Protocol):
    """A video's way to latents of about unit variance and back; both without gradients."""

    @property
    def name(self) -> str:
        """`raw`, `vqvae` or `sd-vae`."""
        ...

    @property
    def time_factor(self) -> int:
        """Frames per latent frame; T must be a multiple of it."""
        ...

    @property
    def space_factor(self) -> int:
        """Pixels per latent element along height and width, which must be multiples of it."""
        ...

    @property
    def channels(self) -> int:
        """C of the latents."""
        ...

    @property
    def digest(self) -> str:
        """Names the weights: two autoencoders of one digest give the same latents, up to rounding."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """Latents of a video, the same every time.

        Args:
            video: [B, T, H, W, 3] in [-1, 1].

        Returns:
            [B, T / time_factor, H / space_factor, W / space_factor, channels], fp32, on the autoencoder's device.

        Raises:
            ValueError: the shape is another, or a size is not a multiple of its factor.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """The video of latents; the inverse of encode up to the compression's loss.

        Args:
            latents: [B, T', H', W', channels].

        Returns:
            [B, T, H, W, 3], fp32, about [-1, 1].

        Raises:
            ValueError: the shape is another.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """Which compression, and how it runs.

    Args:
        autoencoder: `raw` (pixels), `vqvae` or `sd-vae`.
        autoencoder_path: folder of the VQ-VAE; folder or hub name of the AutoencoderKL (its `vae` subfolder is found).
        frame_batch: frames that go through the network at a time; bounds its memory, does not change its result.
        autoencoder_dtype: of its weights: fp32, fp16 or bf16.
    """

    autoencoder: AutoencoderName = "raw"
    autoencoder_path: str | None = None
    frame_batch: int = 8
    autoencoder_dtype: WeightDtype = "fp32"

    def __post_init__(self) -> None:
        if self.autoencoder not in get_args(AutoencoderName):
            raise ValueError(
                f"autoencoder must be one of {', '.join(get_args(AutoencoderName))}; got {self.autoencoder!r}"
            )
        if (self.autoencoder == "raw") != (self.autoencoder_path is None):
            raise ValueError(
                "autoencoder 'raw' takes no autoencoder_path"
                if self.autoencoder == "raw"
                else f"autoencoder {self.autoencoder!r} needs autoencoder_path: the folder of its weights"
                + (" or a hub name" if self.autoencoder == "sd-vae" else "")
            )
        if self.frame_batch < 1:
            raise ValueError(f"frame_batch must be at least 1, got {self.frame_batch}")
        if self.autoencoder_dtype not in DTYPES:
            raise ValueError(f"autoencoder_dtype must be one of {', '.join(DTYPES)}; got {self.autoencoder_dtype!r}")
        if self.autoencoder == "raw":
            for name in ("frame_batch", "autoencoder_dtype"):
                if (value := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"{name} {value} has no effect with autoencoder 'raw', which is no network")


class RawPixels:
    """No compression: latents are pixels in [-1, 1]."""

    name = "raw"
    time_factor = 1
    space_factor = 1
    channels = 3
    digest = ""

    def encode(self, video: Tensor) -> Tensor:
        """The video, [B, T, H, W, 3] fp32."""
        check_video(video, time_factor=1, space_factor=1)
        return video.float()

    def decode(self, latents: Tensor) -> Tensor:
        """The latents, [B, T, H, W, 3] fp32."""
        check_latents(latents, channels=3)
        return latents.float()


def build_autoencoder(config: AutoencoderConfig, *, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder that a configuration names, its weights on a device and frozen.

    Raises:
        ValueError: there are no such weights, or they are damaged or of another kind; names the path and what is wrong.
    """
    if config.autoencoder == "raw":
        return RawPixels()
    path, dtype = config.autoencoder_path, DTYPES[config.autoencoder_dtype]
    assert path is not None
    if config.autoencoder == "vqvae":
        from longreel.models.vqvae import load_vqvae

        model = load_vqvae(Path(path)).to(device, dtype).eval().requires_grad_(False)
        model.frame_batch = config.frame_batch
        return model
    from longreel.models.autoencoder_sd import StableDiffusionVAE

    return StableDiffusionVAE(path, frame_batch=config.frame_batch, dtype=dtype, device=device)


def check_video(video: Tensor, *, time_factor: int, space_factor: int) -> None:
    """ValueError unless video is [B, T, H, W, 3], not empty, with sizes that the factors divide."""
    if video.dim() != 5 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"video must be [B, T, H, W, 3] and not empty, got {list(video.shape)}")
    for name, size, factor in zip(("T", "H", "W"), video.shape[1:4], (time_factor, *2 * [space_factor]), strict=True):
        if size % factor:
            raise ValueError(
                f"video {list(video.shape)} has {name} = {size}, not a multiple of the autoencoder's factor {factor}"
            )


def check_latents(latents: Tensor, *, channels: int) -> None:
    """ValueError unless latents is [B, T', H', W', channels] and not empty."""
    if latents.dim() != 5 or latents.shape[-1] != channels or 0 in latents.shape:
        raise ValueError(f"latents must be [B, T', H', W', {channels}] and not empty, got {list(latents.shape)}")


def psnr(video: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two videos in [-1, 1], values outside clipped; infinite if they are equal.

    Raises:
        ValueError: their shapes differ.
    """
    if video.shape != other.shape:
        raise ValueError(f"videos {list(video.shape)} and {list(other.shape)} must have one shape")
    error = (video.double().clamp(-1, 1) - other.double().clamp(-1, 1)).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)
