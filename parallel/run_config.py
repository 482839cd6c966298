"""What one training run is: data only, checked on construction, also the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from longreel.data.demo import DEMO_FRAMES
from longreel.models.autoencoders import Autoencoder, AutoencoderConfig
from longreel.models.config import DiTConfig
from longreel.models.objective import ObjectiveConfig
from longreel.models.text import TextEncoder, TextEncoderConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.launch import TIMEOUT_SECONDS
from longreel.parallel.model_choice import ModelChoice, check_at_least
from longreel.parallel.optimizer_config import OptimizerConfig

Grouping = Literal["packed", "buckets"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a video DiT.

    Args:
        videos: folder of video files, decoded while training.
        shards: folder of latents that data/prepare.py wrote, trained at their own sizes.
        captions: of --videos: captions file; captions.json in the folder of videos if not given.
        demo: draw and encode four small clips and train on those instead.
        preset: name of a set of choices that stands in front of the command line's; see longreel.parallel.presets.
        out: folder of everything the run writes: metrics.jsonl, checkpoints/, demo/.
        init: weights to start from: a safetensors file of parallel/export.py, of a model that learned the same thing
            in the same latents; not read when a run is resumed.
        resume: go on from the newest whole checkpoint in `out`.
        steps: optimizer steps, counted from the start of the run, resumed or not.
        batch_size: samples of one step over all ranks; ranks need not get the same number. Of --shards and
            --native-sizes: groups of clips, one micro-batch each; a multiple of the data-parallel degree.
        token_budget: of --shards and --native-sizes: video tokens of one group at most.
        grouping: of --shards and --native-sizes: `packed`, clips of any sizes in one sequence, or `buckets`, clips of
            one size in one batch.
        native_sizes: of --videos: clips keep their own height and width, cropped to whole patches, and are packed.
        num_frames: frames of a clip.
        height: of a clip, pixels.
        width: of a clip, pixels.
        frame_stride: distance of a clip's frames in the video.
        caption_dropout: share of samples that train with the empty caption, which guidance needs.
        seed: of weights, data order, captions, timesteps and noise.
        checkpoint_every: steps between checkpoints; the last step always gets one.
        keep: newest checkpoints kept.
        keep_best: keep the checkpoint of the lowest mean loss since the one before it, too.
        background_save: write checkpoints while training goes on.
        log_every: steps between lines of metrics.jsonl.
        tensorboard: write the figures to `out`/tensorboard, too.
        timeout_s: seconds that a collective may take and that ranks wait for each other; one that is gone is named
            after 30 s, or after timeout_s if that is shorter.
        profile: folder for a Chrome trace of each rank (rank-N.json); none if not given.
        profile_steps: first and last step traced, counted from 1.
        model: which DiT.
        objective: what it learns.
        optimizer: how.
        compression: the space it is trained in.
        text: how captions are read.
        plan: `auto` takes strategy, degrees, policy, engine and mlp_tile from the planner
            (longreel.parallel.predict.planner), at this run's shapes and ranks.
        target: of plan `auto`: the GPU to plan for if it is not the one here: a name or a TOML file.
        parallel: how it is spread over the ranks.
        policy_reason: why policy or plan `auto` became what parallel says; not a choice of the command line.
    """

    videos: Path | None = None
    shards: Path | None = None
    captions: Path | None = None
    demo: bool = False
    preset: str | None = None
    out: Path = Path("out/train")
    init: Path | None = None
    resume: bool = False
    steps: int = 300
    batch_size: int = 4
    token_budget: int | None = None
    grouping: Grouping = "packed"
    native_sizes: bool = False
    num_frames: int = 8
    height: int = 32
    width: int = 32
    frame_stride: int = 1
    caption_dropout: float = 0.1
    seed: int = 0
    checkpoint_every: int = 100
    keep: int = 2
    keep_best: bool = True
    background_save: bool = True
    log_every: int = 1
    tensorboard: bool = False
    timeout_s: float = TIMEOUT_SECONDS
    profile: Path | None = None
    profile_steps: tuple[int, int] = (3, 4)
    model: ModelChoice = field(default_factory=ModelChoice)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compression: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    plan: Literal["auto"] | None = None
    target: str | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    policy_reason: Annotated[str | None, tyro.conf.Suppress] = None

    def __post_init__(self) -> None:
        self._check_sources()
        if self.target is not None and self.plan is None:
            raise ValueError(f"target {self.target!r} goes with plan 'auto'; give --plan auto, or leave it out")
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
            check_at_least(self, name, 1)
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be in [0, 1], got {self.caption_dropout}")
        check_seed(self.seed)
        check_timeout(self.timeout_s)
        first, last = self.profile_steps
        if self.profile is None and self.profile_steps != (3, 4):
            raise ValueError(f"profile_steps {first} {last} goes with --profile, the folder of the traces")
        if self.profile is not None and not 1 <= first <= last <= self.steps:
            raise ValueError(
                f"profile_steps must be a first and a last step within 1 to {self.steps} (steps), got {first} {last}"
            )
        if self.compression.autoencoder == "raw" and not self.many_sizes:
            self.model.build().grid(self.num_frames, self.height, self.width)
        span = (self.num_frames - 1) * self.frame_stride + 1
        if self.demo and span > DEMO_FRAMES:
            raise ValueError(
                f"num_frames {self.num_frames} at frame_stride {self.frame_stride} spans {span} frames; "
                f"the clips of --demo have {DEMO_FRAMES}"
            )

    def _check_sources(self) -> None:
        given = [name for name in ("videos", "shards", "demo") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                "give a folder of videos (--videos), one of shards (--shards) or --demo"
                + (f", not {' and '.join(given)}" if given else "; none was given")
            )
        if self.captions is not None and self.videos is None:
            raise ValueError(f"--{given[0]} has its own captions; give --captions only with --videos")
        if self.native_sizes and self.videos is None:
            raise ValueError(f"native_sizes goes with --videos; got it with --{given[0]}")
        if self.many_sizes:
            # Clips that come at their own sizes: what would be left unread is refused.
            unread = ("height", "width") if self.native_sizes else ("num_frames", "height", "width", "frame_stride")
            for name in unread:
                default = type(self).__dataclass_fields__[name].default
                if (value := getattr(self, name)) != default:
                    source = "native_sizes" if self.native_sizes else "shards"
                    raise ValueError(
                        f"{name} {value} has no effect with {source}, whose clips have sizes; leave it out"
                    )
        if self.grouping not in get_args(Grouping):
            raise ValueError(f"grouping must be one of {', '.join(get_args(Grouping))}; got {self.grouping!r}")
        if self.grouping != "packed" and not self.many_sizes:
            raise ValueError(
                f"grouping {self.grouping!r} goes with --shards or --native-sizes: other clips have one size"
            )
        if self.many_sizes and self.optimizer.accumulation != 1:
            raise ValueError(
                f"accumulation {self.optimizer.accumulation}: groups of --shards and --native-sizes are micro-batches "
                "already; a batch_size above the data-parallel degree accumulates"
            )
        if self.many_sizes and self.token_budget is None:
            raise ValueError("clips of their own sizes go in groups: give --token-budget, video tokens of one group")
        if not self.many_sizes and self.token_budget is not None:
            raise ValueError("token_budget goes with --shards or --native-sizes: other clips have one size")
        if self.token_budget is not None:
            check_at_least(self, "token_budget", 1)

    @property
    def many_sizes(self) -> bool:
        """Whether clips keep their own sizes."""
        return self.shards is not None or self.native_sizes

    def dit(self, autoencoder: Autoencoder, encoder: TextEncoder) -> DiTConfig:
        """The model, whose ends fit what compresses videos and reads captions."""
        return self.model.build(
            in_channels=autoencoder.channels,
            raw=autoencoder.name == "raw",
            learn_sigma=self.objective.build().learn_sigma,
            text_dim=encoder.text_dim,
            max_text_tokens=encoder.max_tokens,
        )

    def latent_size(self, autoencoder: Autoencoder) -> tuple[int, int, int]:
        """(T, H, W) of a clip's latents; ValueError names the size that does not divide."""
        factors = autoencoder.time_factor, autoencoder.space_factor, autoencoder.space_factor
        sizes = []
        for name, factor in zip(("num_frames", "height", "width"), factors, strict=True):
            size = getattr(self, name)
            if size % factor:
                raise ValueError(f"{name} = {size} is not a multiple of {factor}, which {autoencoder.name} divides by")
            sizes.append(size // factor)
        return sizes[0], sizes[1], sizes[2]


def check_timeout(seconds: float) -> None:
    """ValueError unless it is a time limit that collectives can have."""
    # A year: what PyTorch counts in milliseconds overflows far beyond.
    if not 1 <= seconds <= 31_536_000 or math.isnan(seconds):
        raise ValueError(f"timeout_s must be between 1 and 31536000 seconds, got {seconds}")


def check_seed(seed: int) -> None:
    """ValueError unless generators take it."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2**63 - 1, got {seed}")
