"""Turn a checkpoint and a prompt into an mp4: `python parallel/sample.py --checkpoint out/train --prompt "..."`."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from longreel.data.clips import per_sample_generator
from longreel.data.mp4 import write_mp4
from longreel.kernels import resolve_attention_provider
from longreel.models.autoencoders import build_autoencoder
from longreel.models.dit import DiT, takes_text
from longreel.models.samplers import choose_sampler, guided, sample_latents
from longreel.models.text import build_text_encoder
from longreel.parallel.comm import all_gather
from longreel.parallel.launch import run_script
from longreel.parallel.mesh import build_mesh, nodes_of_ranks
from longreel.parallel.parallelize import ParallelDiT
from longreel.parallel.sample_batches import NULL_CAPTION
from longreel.parallel.sample_config import SampleConfig
from longreel.parallel.shared_folder import check_writable
from longreel.parallel.trained_model import open_trained


class Sampler:
    """A trained model on the ranks of the default process group; every rank builds one, which checks everything.

    Args:
        config: checkpoint, prompts, steps, size. device: of this rank. console: where remarks go.

    Raises:
        ValueError: no such checkpoint, a damaged one, or sizes, samplers and ranks that do not fit its model.
    """

    def __init__(self, config: SampleConfig, device: torch.device, *, console: Console | None = None) -> None:
        self.config = config
        self.device = device
        self.mesh = build_mesh(
            sp_degree=config.parallel.sp_degree,
            ulysses_degree=config.parallel.ulysses_degree,
            device_type=device.type,
            nodes=nodes_of_ranks(),
            sp_across_nodes=config.parallel.sp_across_nodes,
        )
        first = self.mesh.flat.get_rank() == 0

        def say(line: str) -> None:
            if first and console is not None:
                console.print(line)

        trained = open_trained(
            config.checkpoint,
            self.mesh,
            say,
            autoencoder_path=config.autoencoder_path,
            text_path=config.text_path,
        )
        self.trained = trained
        self.objective = trained.objective.build()
        self.sampler = choose_sampler(config.sampler, self.objective)
        self.autoencoder = build_autoencoder(trained.compression, device=device)
        self.size = self._latent_size()
        resolve_attention_provider(config.parallel.attention_provider, device)
        config.parallel.check_heads(trained.dit.num_heads)
        self._check_conditions()
        self.encoder = build_text_encoder(trained.text, device=device) if takes_text(trained.dit) else None
        channels = trained.dit.in_channels
        if config.guided_channels is not None and config.guided_channels > channels:
            raise ValueError(
                f"guided_channels {config.guided_channels} is more than the {channels} channels of this model; use "
                f"1 to {channels}"
            )
        for name, model in (("autoencoder", self.autoencoder), ("text_encoder", self.encoder)):
            were = trained.encoder_weights.get(name)
            if model is not None and were is not None and model.digest != were:
                say(f"warning: the {name.replace('_', ' ')} has other weights than in training")
        if trained.dit.position == "2d" and self.size[0] > 1:
            say(
                f"warning: {trained.path.name} is a model of single images (position '2d'), which knows no time: its "
                "frames will not follow each other; --num-frames 1 samples an image"
            )
        self.guided_channels = config.guided_channels or trained.guided_channels or channels
        self.model = trained.build(self._spread, config.weights)

    def videos(self, *, progress: Progress | None = None) -> Tensor:
        """The samples of every prompt (or label) and seed; every rank calls it.

        Args:
            progress: bar to move.

        Returns:
            [rows, columns, T, H, W, 3], about [-1, 1], fp32, on the CPU of every rank; the same whatever the ranks, up
            to rounding.
        """
        config = self.config
        rows = len(config.prompt) or len(config.labels)
        wanted = [(row, column) for row in range(rows) for column in range(config.num_samples)]
        # Data-parallel ranks take samples in turn; all of them run the same number of steps, which sharding needs.
        rounds = -(-len(wanted) // self.mesh.dp_degree)
        task = progress.add_task("sample", total=config.steps * rounds) if progress else None
        mine = []
        for turn in range(rounds):
            place = turn * self.mesh.dp_degree + self.mesh.dp_rank
            row, column = wanted[min(place, len(wanted) - 1)]

            def on_step(done: int, turn: int = turn) -> None:
                if progress is not None and task is not None:
                    progress.update(task, completed=turn * config.steps + done)

            mine.append(self._sample(row, config.seed + column, on_step))
        together = all_gather(torch.stack(mine), self.mesh.grid["dp"].get_group().group_name)
        # [dp, rounds] to the order that they were handed out in.
        latents = together.transpose(0, 1).flatten(0, 1)[: len(wanted)]
        videos = torch.stack([self.autoencoder.decode(clip[None])[0].float().cpu() for clip in latents])
        return videos.unflatten(0, (rows, config.num_samples))

    def _sample(self, row: int, seed: int, on_step: Any) -> Tensor:
        """Latents [T, H, W, C] of one prompt and seed."""
        config, device = self.config, self.device
        steered = config.guidance != 1
        text = labels = None
        if self.encoder is not None:
            captions = [config.prompt[row], NULL_CAPTION] if steered else [config.prompt[row]]
            text = self.encoder.encode(captions).to(device)
        if config.labels:
            # The last row of the table is the null class.
            null = self.trained.dit.num_classes
            labels = torch.tensor([config.labels[row], null] if steered else [config.labels[row]], device=device)
        number = 2 if steered else 1
        # Drawn on the CPU, whole: the clip of a seed is the same on any device and any number of ranks.
        generator = per_sample_generator(seed, 0, 0)
        noise = torch.randn(1, *self.size, self.trained.dit.in_channels, generator=generator).to(device)

        def output(x: Tensor, t: float) -> Tensor:
            times = torch.full((number,), t, device=device)
            said = self.model.output(x.expand(number, *x.shape[1:]), times, text=text, labels=labels)
            return guided(said, config.guidance, channels=self.guided_channels) if steered else said

        return sample_latents(
            output,
            noise,
            objective=self.objective,
            sampler=self.sampler,
            num_steps=config.steps,
            generator=generator,
            on_step=on_step,
        )[0]

    def _spread(self, model: DiT) -> ParallelDiT:
        return ParallelDiT(model.to(self.device), self.mesh, self.config.parallel, objective=self.objective)

    def _latent_size(self) -> tuple[int, ...]:
        """(T, H, W) of the latents; ValueError names the size that does not divide."""
        sizes = {name: getattr(self.config, name) or size for name, size in self.trained.clip_size.items()}
        factors = (self.autoencoder.time_factor, *2 * [self.autoencoder.space_factor])
        for (name, size), factor in zip(sizes.items(), factors, strict=True):
            if size % factor:
                raise ValueError(
                    f"{name} = {size} is not a multiple of {factor}, the factor of {self.autoencoder.name}"
                )
        latent = {name: size // factor for (name, size), factor in zip(sizes.items(), factors, strict=True)}
        self.trained.dit.grid(**latent)
        if self.autoencoder.channels != self.trained.dit.in_channels:
            raise ValueError(
                f"autoencoder {self.autoencoder.name} has {self.autoencoder.channels} channels, the model takes "
                f"{self.trained.dit.in_channels}"
            )
        return tuple(latent.values())

    def _check_conditions(self) -> None:
        """ValueError unless the model takes what is given."""
        classes, labels = self.trained.dit.num_classes, self.config.labels
        if labels and not classes:
            raise ValueError("this model knows captions, no classes; give --prompt")
        if labels and max(labels) >= classes:
            raise ValueError(f"labels must be below {classes}, the classes of this model; got {max(labels)}")
        if self.config.prompt and classes:
            raise ValueError("this model knows classes, no captions; give --labels")


def sample_video(config: SampleConfig, device: torch.device) -> Tensor:
    """[T, H, W, 3]: the first video that a trained model makes of the first prompt, see Sampler."""
    return Sampler(config, device).videos()[0, 0]


def tiled(videos: Tensor) -> Tensor:
    """[rows, columns, T, H, W, 3] as one video [T, rows * H, columns * W, 3]."""
    rows, columns, frames, height, width, colours = videos.shape
    return videos.permute(2, 0, 3, 1, 4, 5).reshape(frames, rows * height, columns * width, colours)


def sample(config: SampleConfig, device: torch.device) -> None:
    """Sample and write the mp4; the first rank does the writing."""
    first = torch.distributed.get_rank() == 0
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    sampler = Sampler(config, device, console=console)
    if config.out.is_dir():
        raise ValueError(f"out: {config.out} is a folder; name an .mp4 file")
    check_writable(config.out.parent)
    with Progress(console=console, disable=not first or not console.is_terminal) as progress:
        video = tiled(sampler.videos(progress=progress))
    if first:
        made_by = {
            "prompt": list(config.prompt),
            "labels": list(config.labels),
            "seed": config.seed,
            "num_samples": config.num_samples,
            "sampler": sampler.sampler,
            "steps": config.steps,
            "guidance": config.guidance,
            "checkpoint": str(sampler.trained.path),
        }
        title = "; ".join(config.prompt) or f"classes {', '.join(map(str, config.labels))}"
        metadata = {"title": title[:200], "comment": json.dumps(made_by)}
        encoder = write_mp4(config.out, video, config.fps, metadata=metadata)
        frames, height, width, _ = video.shape
        console.print(f"{config.out}: {frames} frames of {width}x{height}, {encoder}")


if __name__ == "__main__":
    sys.exit(run_script(sample, SampleConfig, sys.argv[1:]))
