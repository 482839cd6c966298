"""Clips of one size, from videos decoded while training, or drawn."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import torch

from longreel.data.captions import load_captions
from longreel.data.clips import ClipDataset
from longreel.data.demo import make_demo_folder
from longreel.data.samples import Clip, ClipSource
from longreel.data.video import VideoInfo
from longreel.models.autoencoders import Autoencoder, build_autoencoder
from longreel.models.objective import Objective
from longreel.models.text import build_text_encoder
from longreel.parallel.batches import Batches, DenseBatches, check_accumulation, split_samples
from longreel.parallel.broken_clips import BrokenClips
from longreel.parallel.checkpoint import wait_for_all
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.sample_batches import Samples
from longreel.parallel.video_folder import Say, say_skipped, video_folder, videos_known

CACHE_BYTES = 256 << 20


class FixedSizeClips:
    """A ClipSource of clips of one size; latents are made where first used and kept.

    Args:
        clips: pixels. autoencoder: of videos. cache_bytes: memory for latents; the least recently used ones go first.
    """

    def __init__(self, clips: ClipDataset, autoencoder: Autoencoder, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._clips, self._autoencoder, self._cache_bytes = clips, autoencoder, cache_bytes
        frames, height, width = clips.size
        space = autoencoder.space_factor
        self.sizes = [(frames // autoencoder.time_factor, height // space, width // space)] * len(clips)
        self.channels = autoencoder.channels
        self._cache: OrderedDict[int, Clip] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Clip:
        """See ClipSource; VideoError if its frames cannot be decoded."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        video, captions = self._clips[index]
        latents = video if self._autoencoder.name == "raw" else self._autoencoder.encode(video[None])[0].cpu()
        source, start = self._clips.locate(index)
        clip = Clip(latents=latents, captions=captions, text=None, fps=0.0, source=source, start=start)
        # Pixels are kept as bytes by what decodes them.
        if self._autoencoder.name != "raw":
            while self._cache and (len(self._cache) + 1) * latents.nbytes > self._cache_bytes:
                self._cache.popitem(last=False)
            self._cache[index] = clip
        return clip

    def video(self, index: int) -> tuple[str, VideoInfo]:
        """See ClipSource."""
        return self._clips.video(index)

    def captions(self, index: int) -> tuple[str, ...]:
        """See ClipSource."""
        return self._clips.captions(index)

    @property
    def digest(self) -> str:
        """See ClipSource."""
        return self._clips.digest


class FixedSizeSource:
    """Clips of one size, from videos or drawn.

    Args:
        config: the run. device: of the encoders. mesh: of the run. say: where remarks go.

    Raises:
        ValueError: sizes that do not fit, too few samples for the ranks, or no video that can be used.
        OSError: files cannot be read.
    """

    def __init__(self, config: TrainConfig, device: torch.device, mesh: ParallelMesh, say: Say) -> None:
        self.config, self._mesh, self._say = config, mesh, say
        split_samples(config.batch_size, mesh.dp_degree, mesh.dp_rank)
        check_accumulation(config.batch_size, mesh.dp_degree, config.optimizer.accumulation)
        self._autoencoder = build_autoencoder(config.compression, device=device)
        self._encoder = build_text_encoder(config.text, device=device)
        self.encoder_weights = {"autoencoder": self._autoencoder.digest, "text_encoder": self._encoder.digest}
        self.model = config.dit(self._autoencoder, self._encoder)
        self.fewest_tokens = math.prod(self.model.grid(*config.latent_size(self._autoencoder)))
        self.clip_size = {name: getattr(config, name) for name in ("num_frames", "height", "width")}
        self.clips: ClipSource | None = None if config.demo else self._open(*video_folder(config))

    @property
    def same_size(self) -> bool:
        """See Source."""
        return True

    @property
    def told(self) -> str:
        """See Source."""
        return f"{self.fewest_tokens} tokens each"

    def ready(self) -> ClipSource:
        """See Source; draws the clips of a demo."""
        if self.clips is None:
            folder = self.config.out / "demo"
            if self._mesh.flat.get_rank() == 0:
                make_demo_folder(folder)
            wait_for_all(self._mesh.flat)
            self.clips = self._open(folder, folder / "captions.json")
        return self.clips

    def batches(self, objective: Objective, device: torch.device, broken: BrokenClips | None = None) -> Batches:
        """See Source."""
        return DenseBatches(
            Samples(
                clips=self.ready(),
                encoder=self._encoder,
                objective=objective,
                seed=self.config.seed,
                caption_dropout=self.config.caption_dropout,
                mesh=self._mesh,
                device=device,
                broken=broken,
            ),
            batch_size=self.config.batch_size,
            accumulation=self.config.optimizer.accumulation,
            tokens=self.fewest_tokens,
        )

    def _open(self, folder: Path, captions: Path) -> ClipSource:
        config = self.config
        files = load_captions(captions)
        clips = ClipDataset(
            folder,
            files,
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            stride=config.frame_stride,
            known=videos_known(config),
        )
        say_skipped(clips.skipped, len(files), self._say)
        return FixedSizeClips(clips, self._autoencoder)
