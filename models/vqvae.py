"""A video-native VQ-VAE: 3-D convolutions, causal in time, and a codebook per group of channels.

Every stage folds pixels (and frames) into channels and convolves; the decoder unfolds them. Beside both runs a linear
map of whole patches that starts out as their mean colour and the lowest frequencies of their brightness, so that
training begins with a blurred video and not with none. All that looks along time looks back only, so a video of any
length passes in pieces of a few frames with what each convolution last saw carried over, and the result is that of the
whole video at once.
Source: van den Oord et al. 2017 (arXiv:1711.00937); over videos, Yan et al. 2021, VideoGPT (arXiv:2104.10157).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from longreel.models.autoencoders import check_latents, check_video
from longreel.models.publish import publish_tensors, published
from longreel.models.weights_digest import weights_digest

WEIGHTS, CONFIG = "vqvae.safetensors", "vqvae.json"

# Vectors compared with the codebooks at a time, outside of training: a frame of 720p would need gigabytes at once.
_ROWS = 1 << 14


@dataclass(frozen=True, kw_only=True, slots=True)
class VQVAEConfig:
    """Architecture of a VQ-VAE.

    Args:
        time_factor: frames per latent frame, a power of two.
        space_factor: pixels per latent element along each side, a power of two, at least 2.
        channels: C of the latents.
        hidden: width of the convolutions.
        res_blocks: residual blocks per stage.
        codebooks: groups that the channels are split into, each with a codebook of its own.
        codebook_size: entries of a codebook.
    """

    time_factor: int = 2
    space_factor: int = 4
    channels: int = 8
    hidden: int = 64
    res_blocks: int = 1
    codebooks: int = 4
    codebook_size: int = 512

    def __post_init__(self) -> None:
        for name, least in (("time_factor", 1), ("space_factor", 2)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name} must be a power of two and at least {least}, got {value}")
        for name, least in (("channels", 1), ("hidden", 1), ("res_blocks", 0), ("codebooks", 1), ("codebook_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.channels % self.codebooks:
            raise ValueError(f"channels {self.channels} is not a multiple of codebooks {self.codebooks}")

    @property
    def stages(self) -> tuple[tuple[int, int, int], ...]:
        """(time, height, width) factor of each stage from the pixels inwards; time is halved in the last ones."""
        in_time, in_space = self.time_factor.bit_length() - 1, self.space_factor.bit_length() - 1
        count = max(in_time, in_space)
        return tuple(
            (2 if i >= count - in_time else 1, *2 * [2 if i < in_space else 1])  # type: ignore[misc]
            for i in range(count)
        )


class VQVAE(nn.Module):
    """The model; an Autoencoder of name `vqvae`.

    Args:
        config: sizes.

    Attributes:
        frame_batch: frames that encode and decode pass through at a time.
    """

    name = "vqvae"
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VQVAEConfig) -> None:
        from vector_quantize_pytorch import VectorQuantize

        super().__init__()
        self.config = config
        self.frame_batch = 8
        self.time_factor, self.space_factor, self.channels = config.time_factor, config.space_factor, config.channels
        hidden = config.hidden
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = [CausalConv3d(config.channels, hidden)]
        for i, fold in enumerate(config.stages):
            volume = fold[0] * fold[1] * fold[2]
            encoder += [_Fold(fold), CausalConv3d((3 if i == 0 else hidden) * volume, hidden)]
            encoder += [_ResBlock(hidden) for _ in range(config.res_blocks)]
        for i, fold in reversed(list(enumerate(config.stages))):
            volume = fold[0] * fold[1] * fold[2]
            decoder += [_ResBlock(hidden) for _ in range(config.res_blocks)]
            decoder += [CausalConv3d(hidden, (3 if i == 0 else hidden) * volume), _Unfold(fold)]
        self.encoder = nn.ModuleList([*encoder, _Norm(hidden), CausalConv3d(hidden, config.channels)])
        self.decoder = nn.ModuleList(decoder)
        self.patch = _Fold((config.time_factor, config.space_factor, config.space_factor))
        self.unpatch = _Unfold(self.patch.factors)
        volume = config.time_factor * config.space_factor**2
        self.patch_in, self.patch_out = nn.Linear(3 * volume, config.channels), nn.Linear(config.channels, 3 * volume)
        with torch.no_grad():
            for last in (self.encoder[-1], self.decoder[-2]):
                for parameter in last.parameters():
                    parameter.zero_()
            basis = _patch_basis(config.channels, self.patch.factors)
            self.patch_in.weight.copy_(basis / basis.square().sum(1, keepdim=True).clamp(min=1))
            self.patch_out.weight.copy_(basis.T)
            for linear in (self.patch_in, self.patch_out):
                linear.bias.zero_()
        self.quantizer = VectorQuantize(
            config.channels,
            config.codebook_size,
            codebook_dim=config.channels // config.codebooks,
            heads=config.codebooks,
            separate_codebook_per_head=True,
            decay=0.9,
            kmeans_init=True,
            threshold_ema_dead_code=1,
            commitment_weight=0.25,
            # The plain straight-through estimator: the rotation trick's gradient explodes near the origin, and a
            # group has few channels.
            rotation_trick=False,
            sync_codebook=False,
        )
        self.register_buffer("latent_mean", torch.zeros(config.channels))
        self.register_buffer("latent_std", torch.ones(config.channels))

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For training.

        Args:
            video: [B, T, H, W, 3] in [-1, 1].

        Returns:
            (reconstruction of that shape, commitment loss, quantised vectors [B, T', H', W', C]).

        Raises:
            FloatingPointError: training has diverged.
        """
        check_video(video, time_factor=self.time_factor, space_factor=self.space_factor)
        vectors = self._encoded(video.permute(0, 4, 1, 2, 3), None).permute(0, 2, 3, 4, 1)
        if not vectors.isfinite().all():
            # The codebooks would take them up, or fail in ways that say nothing.
            raise FloatingPointError("the vectors to quantise are not finite")
        shape = vectors.shape
        quantised, _, commitment = self.quantizer(vectors.reshape(1, -1, shape[-1]))
        quantised = quantised.reshape(shape)
        decoded = self._decoded(quantised.permute(0, 4, 1, 2, 3), None)
        return decoded.permute(0, 2, 3, 4, 1), commitment.sum(), quantised

    @property
    def digest(self) -> str:
        """See Autoencoder."""
        return weights_digest(self, self.config)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """See Autoencoder.encode; normalised by the mean and deviation of the training videos."""
        check_video(video, time_factor=self.time_factor, space_factor=self.space_factor)
        frames = max(self.time_factor, self.frame_batch // self.time_factor * self.time_factor)
        quantised = self._nearest(self._in_pieces(self._encoded, video, frames))
        return (quantised.float() - self.latent_mean.float()) / self.latent_std.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See Autoencoder.decode; latents go to the nearest codes first, which undoes small errors."""
        check_latents(latents, channels=self.channels)
        latents = latents.to(self.latent_mean.device)
        vectors = latents.float() * self.latent_std.float() + self.latent_mean.float()
        quantised = self._nearest(vectors.to(self.latent_mean.dtype))
        return self._in_pieces(self._decoded, quantised, max(1, self.frame_batch // self.time_factor)).float()

    @torch.no_grad()
    def fit_latent_scale(self, quantised: Tensor) -> None:
        """Take mean and deviation of vectors [..., C], so that latents of such videos have zero mean, unit variance."""
        flat = quantised.flatten(0, -2).float()
        self.latent_mean.copy_(flat.mean(0))
        self.latent_std.copy_(flat.std(0).clamp(min=1e-6))

    def _encoded(self, x: Tensor, seen: dict[nn.Module, Tensor] | None) -> Tensor:
        """[B, 3, T, H, W] -> [B, C, T', H', W'], not quantised."""
        linear = self.patch_in(self.patch(x).movedim(1, -1)).movedim(-1, 1)
        return linear + _apply(self.encoder, x, seen)

    def _decoded(self, x: Tensor, seen: dict[nn.Module, Tensor] | None) -> Tensor:
        """[B, C, T', H', W'] -> [B, 3, T, H, W]."""
        linear = self.unpatch(self.patch_out(x.movedim(1, -1)).movedim(-1, 1))
        return linear + _apply(self.decoder, x, seen)

    def _nearest(self, vectors: Tensor) -> Tensor:
        """Nearest codes of vectors [..., C]."""
        rows = vectors.reshape(-1, vectors.shape[-1]).split(_ROWS)
        return torch.cat([self.quantizer(part[None])[0][0] for part in rows]).reshape(vectors.shape).to(vectors.dtype)

    def _in_pieces(self, run: Callable[[Tensor, dict[nn.Module, Tensor]], Tensor], x: Tensor, frames: int) -> Tensor:
        """[B, T, H, W, C] through run, some frames at a time."""
        seen: dict[nn.Module, Tensor] = {}
        x = x.to(self.latent_mean.device, self.latent_mean.dtype).permute(0, 4, 1, 2, 3)
        return torch.cat([run(piece, seen) for piece in x.split(frames, dim=2)], dim=2).permute(0, 2, 3, 4, 1)


def _patch_basis(channels: int, factors: tuple[int, int, int]) -> Tensor:
    """[C, 3 ft fh fw] orthogonal rows: the mean of each colour, then cosines of all three, from low to high."""
    time, height, width = (
        torch.cos(torch.pi * (torch.arange(size) + 0.5) * torch.arange(size)[:, None] / size) for size in factors
    )
    waves = torch.einsum("at,bh,cw->abcthw", time, height, width).flatten(0, 2).flatten(1)
    frequencies = torch.cartesian_prod(*(torch.arange(size) for size in factors)).reshape(-1, 3).sum(1)
    order = frequencies.argsort(stable=True)[1:]
    means = torch.eye(3).repeat_interleave(waves.shape[1], 1)
    rows = torch.cat([means, waves[order].repeat(1, 3)])
    # Channels beyond are left for the convolutions.
    return F.pad(rows, (0, 0, 0, max(0, channels - len(rows))))[:channels]


class CausalConv3d(nn.Conv3d):
    """3 x 3 x 3 convolution whose output at a frame sees that frame and the two before; sizes stay.

    Before the first frame stands the first frame, outside the picture its edge.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3)

    def apply_to(self, x: Tensor, seen: dict[nn.Module, Tensor] | None) -> Tensor:
        """x [B, C, T, H, W]; seen: the last two input frames of every convolution, from piece to piece."""
        before = None if seen is None else seen.get(self)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, 2, -1, -1)
        x = torch.cat([before, x], dim=2)
        if seen is not None:
            seen[self] = x[:, :, -2:]
        return self(F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate"))


class _ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [_Norm(channels), CausalConv3d(channels, channels), _Norm(channels), CausalConv3d(channels, channels)]
        )

    def apply_to(self, x: Tensor, seen: dict[nn.Module, Tensor] | None) -> Tensor:
        return x + _apply(self.layers, x, seen)


class _Norm(nn.Module):
    """RMS norm over channels, position by position (a norm over frames would tie pieces together), then SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.scale)


class _Fold(nn.Module):
    """[B, C, T, H, W] -> [B, C ft fh fw, T / ft, H / fh, W / fw]."""

    def __init__(self, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        (ft, fh, fw), (b, c, t, h, w) = self.factors, x.shape
        split = x.reshape(b, c, t // ft, ft, h // fh, fh, w // fw, fw)
        return split.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * ft * fh * fw, t // ft, h // fh, w // fw)


class _Unfold(_Fold):
    """The inverse of _Fold."""

    def forward(self, x: Tensor) -> Tensor:
        (ft, fh, fw), (b, _, t, h, w) = self.factors, x.shape
        split = x.reshape(b, -1, ft, fh, fw, t, h, w)
        return split.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, -1, t * ft, h * fh, w * fw)


def _apply(layers: nn.ModuleList, x: Tensor, seen: dict[nn.Module, Tensor] | None) -> Tensor:
    for layer in layers:
        step: Callable[..., Tensor] | None = getattr(layer, "apply_to", None)
        x = layer(x) if step is None else step(x, seen)
    return x


def save_vqvae(model: VQVAE, folder: Path) -> None:
    """Write vqvae.safetensors and vqvae.json into a folder, created if needed; each appears whole or not at all.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().float().contiguous().cpu() for name, value in model.state_dict().items()}
    publish_tensors(folder / WEIGHTS, state)
    with published(folder / CONFIG) as partial:
        partial.write_text(json.dumps(asdict(model.config), indent=1) + "\n", encoding="utf-8")


def load_vqvae(folder: Path) -> VQVAE:
    """The model that save_vqvae wrote.

    Raises:
        ValueError: the folder holds none, or a damaged one; names the file.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: holds no {name}; give the folder that data/train_vqvae.py wrote")
    try:
        fields: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model = VQVAE(VQVAEConfig(**fields))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: not the configuration of a VQ-VAE: {error}") from error
    try:
        state = load_file(folder / WEIGHTS)
        own = model.state_dict()
        model.load_state_dict(
            {name: value.to(own[name].dtype) if name in own else value for name, value in state.items()}
        )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS}: not the weights of this VQ-VAE: {str(error).splitlines()[0]}") from error
    return model
