"""What one sampling run is: data only, checked on construction, also the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from longreel.data.mp4 import MAX_FPS, MIN_FPS
from longreel.models.samplers import SamplerName
from longreel.parallel.config import ParallelConfig
from longreel.parallel.launch import TIMEOUT_SECONDS
from longreel.parallel.model_choice import check_at_least
from longreel.parallel.run_config import check_seed, check_timeout

Weights = Literal["auto", "model", "ema"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Turn a checkpoint and prompts into an mp4.

    Args:
        checkpoint: folder of one checkpoint, the `out` folder of a run, whose newest whole one is taken, or a
            safetensors file of parallel/export.py.
        prompt: captions, one row of the grid each; the empty one is what guidance steers away from.
        labels: classes instead of prompts, of a class-conditioned model.
        num_samples: columns of the grid: samples of each prompt, of the seeds seed, seed + 1, ...
        out: the mp4 file; what made it is in its metadata.
        sampler: `euler` of flows; `dpm++`, `ddim` or `ddpm` of diffusion. The first that fits if not given.
        steps: from noise to video.
        guidance: classifier-free guidance scale; 1 is none and costs half.
        guided_channels: how many of the first channels guidance steers; all if not given, 3 for weights of the
            original DiT, as its own code does.
        weights: `model`, their moving average `ema`, or `auto`: the average where there is one.
        seed: of the noise.
        num_frames: frames of the video; as many as a training clip has if not given.
        height: pixels, that of the training clips if not given.
        width: pixels, that of the training clips if not given.
        fps: frames per second of the file, 0.1 to 1000.
        autoencoder_path: where the autoencoder lies now, if not where it was in training.
        text_path: where the text encoder lies now.
        timeout_s: seconds that a collective may take and that ranks wait for each other.
        parallel: how the model is spread over the ranks.
    """

    checkpoint: Path
    prompt: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    num_samples: int = 1
    out: Path = Path("clip.mp4")
    sampler: SamplerName | None = None
    steps: int = 50
    guidance: float = 2.0
    guided_channels: int | None = None
    weights: Weights = "auto"
    seed: int = 0
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float = 8
    autoencoder_path: str | None = None
    text_path: str | None = None
    timeout_s: float = TIMEOUT_SECONDS
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if bool(self.prompt) == bool(self.labels):
            raise ValueError("give prompts (--prompt), or labels (--labels) of a class-conditioned model")
        for text in self.prompt:
            # What a command line cannot read as text becomes lone surrogates, which neither text encoders nor mp4 take.
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"prompt must be UTF-8 text, got {text[:80]!r}")
        if self.labels and min(self.labels) < 0:
            raise ValueError(f"labels must be 0 or more, got {min(self.labels)}")
        for name in ("steps", "num_samples"):
            check_at_least(self, name, 1)
        for name in ("num_frames", "height", "width", "guided_channels"):
            if getattr(self, name) is not None:
                check_at_least(self, name, 1)
        if not 0 < self.guidance < math.inf:
            raise ValueError(f"guidance must be positive and finite, got {self.guidance}")
        if self.guided_channels is not None and self.guidance == 1:
            raise ValueError(f"guided_channels {self.guided_channels} has no effect at guidance 1, which is none")
        if self.parallel.policy not in ("none", "auto"):
            raise ValueError(
                f"policy {self.parallel.policy!r} saves memory for backward, which sampling has none of; leave it out"
            )
        if not MIN_FPS <= self.fps <= MAX_FPS:
            raise ValueError(f"fps must be between {MIN_FPS} and {MAX_FPS:.0f}, got {self.fps}")
        check_seed(self.seed)
        check_seed(self.seed + self.num_samples - 1)
        check_timeout(self.timeout_s)
        if self.out.suffix != ".mp4":
            raise ValueError(f"out must be an .mp4 file, got {self.out}")
