"""Stable Diffusion's VAE over the frames of a video, by diffusers' AutoencoderKL.

Source: Rombach et al. 2022 (arXiv:2112.10752); each frame is compressed by itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from longreel.models.autoencoders import check_latents, check_video
from longreel.models.pretrained import find_pretrained, load_pretrained
from longreel.models.weights_digest import weights_digest


class StableDiffusionVAE:
    """An Autoencoder of name `sd-vae`.

    encode takes the mean of the posterior, so that it is the same every time; latents are (z - shift_factor) *
    scaling_factor of the VAE's configuration.

    Args:
        path: folder of an AutoencoderKL (or of a pipeline that has it in `vae`), or a hub name.
        frame_batch: frames at a time. dtype: of the weights. device: where they go.

    Raises:
        ValueError: there is no AutoencoderKL at path, or it takes no RGB pictures.
    """

    name = "sd-vae"
    time_factor = 1

    def __init__(
        self,
        path: str,
        *,
        frame_batch: int = 8,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        from diffusers import AutoencoderKL

        source = find_pretrained("autoencoder_path", path)
        inside = isinstance(source, Path) and not (source / "config.json").is_file() and (source / "vae").is_dir()
        where = source / "vae" if isinstance(source, Path) and inside else source
        loaded = load_pretrained(AutoencoderKL.from_pretrained, "autoencoder_path", where, torch_dtype=dtype)
        self._vae = loaded.to(device).eval().requires_grad_(False)
        config = self._vae.config
        if config.in_channels != 3 or config.out_channels != 3:
            raise ValueError(
                f"autoencoder_path: {path} takes {config.in_channels} channels and gives {config.out_channels}; "
                "a VAE of RGB pictures has 3 and 3"
            )
        self.frame_batch = frame_batch
        self.channels: int = config.latent_channels
        self.space_factor: int = 2 ** (len(config.block_out_channels) - 1)
        self._scale: float = config.scaling_factor
        self._shift: float = config.shift_factor or 0.0

    @property
    def digest(self) -> str:
        """See Autoencoder."""
        return weights_digest(self._vae, self._scale, self._shift)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """See Autoencoder.encode."""
        check_video(video, time_factor=1, space_factor=self.space_factor)
        frames = video.flatten(0, 1).permute(0, 3, 1, 2)
        latents = [
            self._vae.encode(part.to(self._vae.device, self._vae.dtype)).latent_dist.mode().float()
            for part in frames.split(self.frame_batch)
        ]
        whole = (torch.cat(latents) - self._shift) * self._scale
        return whole.permute(0, 2, 3, 1).unflatten(0, video.shape[:2])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See Autoencoder.decode."""
        check_latents(latents, channels=self.channels)
        frames = latents.flatten(0, 1).permute(0, 3, 1, 2).float() / self._scale + self._shift
        pictures = [
            self._vae.decode(part.to(self._vae.device, self._vae.dtype)).sample.float()
            for part in frames.split(self.frame_batch)
        ]
        return torch.cat(pictures).permute(0, 2, 3, 1).unflatten(0, latents.shape[:2])
