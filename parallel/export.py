"""Weights to one safetensors file: of a checkpoint, or of the original DiT's .pt.

`python parallel/export.py --checkpoint out/train --out model.safetensors`, which parallel/sample.py and train.py --init
take; `--original DiT-XL-2-256x256.pt --autoencoder-path sd-vae-ft-ema` for the released checkpoints.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from longreel.data.command_line import run_command
from longreel.models.autoencoders import AutoencoderConfig
from longreel.models.config import DiTConfig
from longreel.models.objective import ObjectiveConfig
from longreel.models.original import import_original
from longreel.models.text import TextEncoderConfig
from longreel.parallel.checkpoint import has_ema, read_run, read_weights, take_checkpoint
from longreel.parallel.config_json import to_json
from longreel.parallel.weights_file import read_pickled_weights, write_weights

# Heads of the released sizes, by width.
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# Pixels along a side of a latent element of the autoencoder that the original was trained with.
_SPACE_FACTOR = 8
# Its own code guides three of four latent channels.
GUIDED_CHANNELS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write weights as one safetensors file.

    Args:
        checkpoint: folder of one checkpoint, or the `out` folder of a run, whose newest whole one is
            taken.
        original: a .pt of the original DiT instead.
        autoencoder_path: of `original`: folder or hub name of the SD-VAE that its latents are of.
        weights: of `checkpoint`: `model`, `ema`, or `auto`: the average where there is one.
        out: the safetensors file.
    """

    checkpoint: Path | None = None
    original: Path | None = None
    autoencoder_path: str | None = None
    weights: Literal["auto", "model", "ema"] = "auto"
    out: Path = Path("model.safetensors")

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.original is None):
            raise ValueError("give --checkpoint, or --original: one of them")
        if (self.original is None) != (self.autoencoder_path is None):
            raise ValueError("--original needs --autoencoder-path, the SD-VAE of its latents; nothing else takes it")
        if self.original is not None and self.weights != "auto":
            raise ValueError(
                f"weights {self.weights!r} is a choice of --checkpoint; of an original .pt its average is taken where "
                "it has one"
            )
        if self.out.suffix != ".safetensors":
            raise ValueError(f"out must be a .safetensors file, got {self.out}")


def export(config: ExportConfig) -> None:
    """Write the file that the configuration asks for and say what is in it."""
    if config.original is not None:
        assert config.autoencoder_path is not None
        state = read_pickled_weights(config.original)
        try:
            weights, run = from_original(state, config.autoencoder_path)
        except ValueError as error:
            raise ValueError(f"{config.original}: {error}") from error
    else:
        assert config.checkpoint is not None
        checkpoint = take_checkpoint(config.checkpoint, lambda line: print(line, file=sys.stderr, flush=True))
        entry = config.weights
        if entry == "auto":
            entry = "ema" if has_ema(checkpoint) else "model"
        weights, run = read_weights(checkpoint, entry), read_run(checkpoint)[1]
    write_weights(config.out, weights, run)
    print(f"{config.out}: {sum(tensor.numel() for tensor in weights.values()):,} parameters")


def from_original(state: Mapping[str, Tensor], autoencoder_path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights by our names, configuration) of a state dict in the original DiT's layout.

    Raises:
        ValueError: it is another model's.
    """
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
        out_channels = state["final_layer.linear.weight"].shape[0] // patch**2
        side = math.isqrt(state["pos_embed"].shape[1])
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"not a checkpoint of the original DiT: {error} is missing or of another shape") from error
    if width not in _HEADS:
        raise ValueError(f"width {width} is none of the released sizes; widths are {', '.join(map(str, _HEADS))}")
    dit = DiTConfig(
        depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        hidden_size=width,
        num_heads=_HEADS[width],
        patch_size=(1, patch, patch),
        in_channels=channels,
        learn_sigma=out_channels == 2 * channels,
        num_classes=classes,
        position="2d",
    )
    pixels = side * patch * _SPACE_FACTOR
    run = {
        "dit": to_json(dit),
        "objective": asdict(ObjectiveConfig(objective="ddpm")),
        "compression": asdict(AutoencoderConfig(autoencoder="sd-vae", autoencoder_path=autoencoder_path)),
        "text": asdict(TextEncoderConfig()),
        "clip_size": {"num_frames": 1, "height": pixels, "width": pixels},
        "guided_channels": GUIDED_CHANNELS,
    }
    return import_original(state, dit), run


if __name__ == "__main__":
    sys.exit(run_command(export, ExportConfig, sys.argv[1:]))
