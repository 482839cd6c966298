"""What one training run or one sampling run is: data only, checked on construction, also the command line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from longreel.data.demo import DEMO_FRAMES
from longreel.data.video import MAX_FPS, MIN_FPS
from longreel.models.config import Conditioning, CrossLayout, DiTConfig, preset
from longreel.parallel.config import ParallelConfig
from longreel.parallel.launch import TIMEOUT_SECONDS


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """Which DiT to train on raw pixels.

    Args:
        preset: name of a preset (`dit-s-2` ... `dit-xl-4`), whose depth, width and heads then count; without one the
            three below do, a model small enough for a CPU.
        depth: number of blocks.
        hidden_size: width of the model.
        num_heads: attention heads.
        patch_size: (frames, height, width) of one patch in pixels. A patch of more numbers (3 colours each) than the
            model is wide cannot be predicted exactly.
        conditioning: how the caption enters: `adaln`, `cross` or `in_context`.
        text_only: leave self-attention out; needs conditioning `cross`.
        cross_layout: text attention on `replicated` text, or as `published`: heads split, text tokens sharded.
        text_dim: width of the byte-level text features, even.
        max_text_tokens: bytes of a caption that are read, plus 2; at least 3.
    """

    preset: str | None = None
    depth: int = 2
    hidden_size: int = 128
    num_heads: int = 4
    patch_size: tuple[int, int, int] = (2, 4, 4)
    conditioning: Conditioning = "cross"
    text_only: bool = False
    cross_layout: CrossLayout = "replicated"
    text_dim: int = 128
    max_text_tokens: int = 48

    def __post_init__(self) -> None:
        for name in ("depth", "hidden_size", "num_heads", "text_dim", "max_text_tokens"):
            _at_least(self, name, 1)
        if self.text_dim % 2:
            raise ValueError(f"text_dim must be even and at least 2, got {self.text_dim}")
        if self.max_text_tokens < 3:
            raise ValueError(f"max_text_tokens must be at least 3 (begin, one byte, end), got {self.max_text_tokens}")
        self.build()

    def build(self) -> DiTConfig:
        """The model's configuration; ValueError for an unknown preset or sizes that do not fit."""
        shared: dict[str, Any] = {
            "patch_size": tuple(self.patch_size),
            "in_channels": 3,
            "conditioning": self.conditioning,
            "text_only": self.text_only,
            "cross_layout": self.cross_layout,
            "text_dim": self.text_dim,
            "max_text_tokens": self.max_text_tokens,
        }
        if self.preset is not None:
            return preset(self.preset, **shared)
        return DiTConfig(depth=self.depth, hidden_size=self.hidden_size, num_heads=self.num_heads, **shared)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a video DiT on raw pixels with rectified flow.

    Args:
        videos: folder of video files.
        captions: JSON list of {"file", "captions"}; captions.json in the folder of videos if not given.
        demo: draw and encode four small clips and train on those instead.
        out: folder of everything the run writes: metrics.jsonl, checkpoints/, demo/.
        resume: go on from the newest checkpoint in `out`.
        steps: optimizer steps, counted from the start of the run, resumed or not.
        batch_size: samples of one step over all ranks; ranks need not get the same number.
        num_frames: frames of a clip.
        height: of a clip, pixels.
        width: of a clip, pixels.
        frame_stride: distance of a clip's frames in the video.
        learning_rate: of AdamW.
        warmup_steps: steps over which the learning rate rises to its value.
        betas: of AdamW.
        weight_decay: of AdamW.
        caption_dropout: share of samples that train with the empty caption, which guidance needs.
        seed: of weights, data order, captions, timesteps and noise.
        checkpoint_every: steps between checkpoints; the last step always gets one.
        keep: newest checkpoints kept.
        log_every: steps between lines of metrics.jsonl.
        timeout_s: seconds that a collective may take and that ranks wait for each other; one that is gone is named
            after 30 s, or after timeout_s if that is shorter.
        profile: folder for a Chrome trace of each rank (rank-N.json); none if not given.
        profile_steps: first and last step traced, counted from 1.
        model: which DiT.
        parallel: how it is spread over the ranks.
        policy_reason: why policy `auto` became what parallel.policy says; not a choice of the command line.
    """

    videos: Path | None = None
    captions: Path | None = None
    demo: bool = False
    out: Path = Path("out/train")
    resume: bool = False
    steps: int = 300
    batch_size: int = 4
    num_frames: int = 8
    height: int = 32
    width: int = 32
    frame_stride: int = 1
    learning_rate: float = 3e-3
    warmup_steps: int = 10
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    caption_dropout: float = 0.1
    seed: int = 0
    checkpoint_every: int = 100
    keep: int = 2
    log_every: int = 1
    timeout_s: float = TIMEOUT_SECONDS
    profile: Path | None = None
    profile_steps: tuple[int, int] = (3, 4)
    model: ModelChoice = field(default_factory=ModelChoice)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    policy_reason: Annotated[str | None, tyro.conf.Suppress] = None

    def __post_init__(self) -> None:
        if self.demo == (self.videos is not None):
            raise ValueError(
                "give a folder of videos (--videos) or --demo" + (", not both" if self.demo else "; neither was given")
            )
        if self.captions is not None and self.demo:
            raise ValueError("--demo writes its own captions; give --captions only with --videos")
        for name in (
            "steps",
            "batch_size",
            "num_frames",
            "height",
            "width",
            "frame_stride",
            "checkpoint_every",
            "keep",
            "log_every",
        ):
            _at_least(self, name, 1)
        _at_least(self, "warmup_steps", 0)
        _at_least(self, "weight_decay", 0)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be in [0, 1], got {self.caption_dropout}")
        _check_seed(self.seed)
        _check_timeout(self.timeout_s)
        first, last = self.profile_steps
        if self.profile is not None and not 1 <= first <= last <= self.steps:
            raise ValueError(
                f"profile_steps must be a first and a last step within 1 to {self.steps} (steps), got {first} {last}"
            )
        self.model.build().grid(self.num_frames, self.height, self.width)
        span = (self.num_frames - 1) * self.frame_stride + 1
        if self.demo and span > DEMO_FRAMES:
            raise ValueError(
                f"num_frames {self.num_frames} at frame_stride {self.frame_stride} spans {span} frames; "
                f"the clips of --demo have {DEMO_FRAMES}"
            )

    @property
    def tokens_per_sample(self) -> int:
        """Video tokens of one clip."""
        t, h, w = self.model.build().grid(self.num_frames, self.height, self.width)
        return t * h * w


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Turn a checkpoint and a prompt into an mp4.

    Args:
        checkpoint: folder of one checkpoint, or the `out` folder of a run, whose newest one is taken.
        prompt: caption; the empty one is what guidance steers away from.
        out: the mp4 file.
        steps: Euler steps from noise to video.
        guidance: classifier-free guidance scale; 1 is none and costs half.
        seed: of the noise.
        num_frames: frames of the video; as many as a training clip has if not given.
        height: pixels, that of the training clips if not given.
        width: pixels, that of the training clips if not given.
        fps: frames per second of the file, 0.1 to 1000.
        timeout_s: seconds that a collective may take and that ranks wait for each other.
        parallel: how the model is spread over the ranks.
    """

    checkpoint: Path
    prompt: str
    out: Path = Path("clip.mp4")
    steps: int = 50
    guidance: float = 2.0
    seed: int = 0
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float = 8
    timeout_s: float = TIMEOUT_SECONDS
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        _at_least(self, "steps", 1)
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) is not None:
                _at_least(self, name, 1)
        if not 0 < self.guidance < math.inf:
            raise ValueError(f"guidance must be positive and finite, got {self.guidance}")
        if not MIN_FPS <= self.fps <= MAX_FPS:
            raise ValueError(f"fps must be between {MIN_FPS} and {MAX_FPS:.0f}, got {self.fps}")
        _check_seed(self.seed)
        _check_timeout(self.timeout_s)
        if self.out.suffix != ".mp4":
            raise ValueError(f"out must be an .mp4 file, got {self.out}")


def to_json(config: TrainConfig | SampleConfig) -> dict[str, Any]:
    """The whole tree as what JSON holds: paths become strings."""
    return _plain(asdict(config))


def model_from_json(data: dict[str, Any]) -> DiTConfig:
    """The model of a configuration written by to_json; ValueError if it does not fit this version."""
    if not isinstance(data.get("model"), dict):
        raise ValueError(f"model: expected the sizes of a model, got {data.get('model')!r}")
    model = data["model"]
    patch = model.get("patch_size")
    if not isinstance(patch, list) or not all(type(size) is int for size in patch):
        raise ValueError(f"model.patch_size: expected three whole numbers, got {patch!r}")
    for name in ("depth", "hidden_size", "num_heads", "text_dim", "max_text_tokens"):
        _integer(model, name, "model.")
    try:
        return ModelChoice(**(model | {"patch_size": tuple(patch)})).build()
    except TypeError as error:
        raise ValueError(f"model: not one of this version: {error}") from error


def clip_size_from_json(data: dict[str, Any]) -> dict[str, int]:
    """num_frames, height and width of the training clips; ValueError names what is missing or no number."""
    return {name: _integer(data, name) for name in ("num_frames", "height", "width")}


def _integer(data: dict[str, Any], name: str, inside: str = "") -> int:
    value = data.get(name)
    if type(value) is not int:
        raise ValueError(f"{inside}{name}: expected a whole number, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _at_least(config: object, name: str, least: float) -> None:
    value = getattr(config, name)
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    # PyTorch answers larger sizes with a TypeError and a stack of its own.
    if value >= 2**31:
        raise ValueError(f"{name} must be below 2**31, got {value}")


def _check_timeout(seconds: float) -> None:
    # A year: what PyTorch counts in milliseconds overflows far beyond.
    if not 1 <= seconds <= 31_536_000:
        raise ValueError(f"timeout_s must be between 1 and 31536000 seconds, got {seconds}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2**63 - 1, got {seed}")
