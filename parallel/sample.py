"""Turn a checkpoint and a prompt into an mp4: `python parallel/sample.py --checkpoint out/train --prompt "..."`."""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from longreel.data.clips import per_sample_generator
from longreel.data.video import write_mp4
from longreel.kernels import resolve_attention_provider
from longreel.models.dit import DiT
from longreel.models.flow import euler_sample, guided_velocity
from longreel.models.text import ByteTextEncoder
from longreel.parallel.batches import NULL_CAPTION
from longreel.parallel.checkpoint import find_checkpoint, load_checkpoint, read_run
from longreel.parallel.launch import run_script
from longreel.parallel.mesh import build_mesh, nodes_of_ranks
from longreel.parallel.parallelize import ParallelDiT
from longreel.parallel.run_config import SampleConfig, clip_size_from_json, model_from_json
from longreel.parallel.trainer import check_writable


class Sampler:
    """A checkpoint's model on the ranks of the default process group; every rank builds one, which checks everything.

    Args:
        config: checkpoint, prompt, steps, size. device: of this rank.

    Raises:
        ValueError: no such checkpoint, a damaged one, or sizes and ranks that do not fit its model.
    """

    def __init__(self, config: SampleConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        checkpoint = find_checkpoint(config.checkpoint)
        _, trained = read_run(checkpoint)
        try:
            model_config = model_from_json(trained)
            sizes = clip_size_from_json(trained)
        except ValueError as error:
            raise ValueError(f"{checkpoint / 'run.json'}: {error}") from error
        sizes = {name: getattr(config, name) or size for name, size in sizes.items()}
        model_config.grid(**sizes)
        self.size = tuple(sizes.values())
        resolve_attention_provider(config.parallel.attention_provider, device)
        self.encoder = ByteTextEncoder(model_config.text_dim, model_config.max_text_tokens)
        config.parallel.check_heads(model_config.num_heads)
        mesh = build_mesh(
            sp_degree=config.parallel.sp_degree,
            ulysses_degree=config.parallel.ulysses_degree,
            device_type=device.type,
            nodes=nodes_of_ranks(),
            sp_across_nodes=config.parallel.sp_across_nodes,
        )
        self.model = ParallelDiT(DiT(model_config).to(device), mesh, config.parallel)
        load_checkpoint(checkpoint, self.model.engine)

    def video(self, *, progress: Progress | None = None) -> Tensor:
        """The video of the prompt; every rank calls it.

        Args:
            progress: bar to move.

        Returns:
            [T, H, W, 3], about [-1, 1], fp32, on the CPU of every rank; the same whatever the ranks, up to rounding.
        """
        config, device = self.config, self.device
        guided = config.guidance != 1
        text = self.encoder.encode([config.prompt, NULL_CAPTION] if guided else [config.prompt]).to(device)
        # Drawn on the CPU, whole: the clip of a seed is the same on any device and any number of ranks.
        noise = torch.randn(1, *self.size, 3, generator=per_sample_generator(config.seed, 0, 0)).to(device)

        def velocity(x: Tensor, t: float) -> Tensor:
            repeated = x.expand(len(text), *x.shape[1:])
            predicted = self.model.velocity(repeated, torch.full((len(text),), t, device=device), text=text)
            return guided_velocity(predicted[:1], predicted[1:], config.guidance) if guided else predicted

        task = progress.add_task("sample", total=config.steps) if progress else None

        def on_step(done: int) -> None:
            if progress is not None and task is not None:
                progress.update(task, completed=done)

        return euler_sample(velocity, noise, config.steps, on_step=on_step)[0].float().cpu()


def sample_video(config: SampleConfig, device: torch.device) -> Tensor:
    """The video that a checkpoint's model makes of a prompt, see Sampler."""
    return Sampler(config, device).video()


def sample(config: SampleConfig, device: torch.device) -> None:
    """Sample and write the mp4; the first rank does the writing."""
    first = torch.distributed.get_rank() == 0
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    sampler = Sampler(config, device)
    if config.out.is_dir():
        raise ValueError(f"out: {config.out} is a folder; name an .mp4 file")
    check_writable(config.out.parent)
    with Progress(console=console, disable=not first or not console.is_terminal) as progress:
        video = sampler.video(progress=progress)
    if first:
        encoder = write_mp4(config.out, video, config.fps)
        frames, height, width, _ = video.shape
        console.print(f"{config.out}: {frames} frames of {width}x{height}, {encoder}")


if __name__ == "__main__":
    sys.exit(run_script(sample, SampleConfig, sys.argv[1:]))
