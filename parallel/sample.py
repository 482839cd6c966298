"""Turn a checkpoint and a prompt into an mp4: `python parallel/sample.py --checkpoint out/train --prompt "..."`."""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from longreel.data.clips import per_sample_generator
from longreel.data.video import write_mp4
from longreel.models.dit import DiT
from longreel.models.flow import euler_sample, guided_velocity
from longreel.models.text import ByteTextEncoder
from longreel.parallel.batches import NULL_CAPTION
from longreel.parallel.checkpoint import find_checkpoint, load_checkpoint, read_run
from longreel.parallel.config import check_heads
from longreel.parallel.launch import run_script
from longreel.parallel.mesh import build_mesh
from longreel.parallel.parallelize import ParallelDiT
from longreel.parallel.run_config import SampleConfig, model_from_json
from longreel.parallel.trainer import check_writable


def sample_video(config: SampleConfig, device: torch.device, *, progress: Progress | None = None) -> Tensor:
    """The video that a checkpoint's model makes of a prompt; every rank of the process group calls it.

    Args:
        config: checkpoint, prompt, steps, size. device: of this rank. progress: bar to move.

    Returns:
        [T, H, W, 3], about [-1, 1], fp32, on the CPU of every rank; the same whatever the ranks, up to rounding.

    Raises:
        ValueError: no such checkpoint, or sizes and ranks that do not fit its model.
    """
    checkpoint = find_checkpoint(config.checkpoint)
    _, trained = read_run(checkpoint)
    model_config = model_from_json(trained)
    sizes = {name: getattr(config, name) or trained[name] for name in ("num_frames", "height", "width")}
    model_config.grid(**sizes)
    check_heads(model_config.num_heads, config.parallel.sp_degree)
    mesh = build_mesh(sp_degree=config.parallel.sp_degree, device_type=device.type)
    model = ParallelDiT(DiT(model_config).to(device), mesh, config.parallel)
    load_checkpoint(checkpoint, model.module)

    guided = config.guidance != 1
    encoder = ByteTextEncoder(model_config.text_dim, model_config.max_text_tokens)
    text = encoder.encode([config.prompt, NULL_CAPTION] if guided else [config.prompt]).to(device)
    # Drawn on the CPU, whole: the clip of a seed is the same on any device and any number of ranks.
    noise = torch.randn(1, *sizes.values(), 3, generator=per_sample_generator(config.seed, 0, 0)).to(device)

    def velocity(x: Tensor, t: float) -> Tensor:
        repeated = x.expand(len(text), *x.shape[1:])
        predicted = model.velocity(repeated, torch.full((len(text),), t, device=device), text=text)
        return guided_velocity(predicted[:1], predicted[1:], config.guidance) if guided else predicted

    task = progress.add_task("sample", total=config.steps) if progress else None

    def on_step(done: int) -> None:
        if progress is not None and task is not None:
            progress.update(task, completed=done)

    return euler_sample(velocity, noise, config.steps, on_step=on_step)[0].float().cpu()


def sample(config: SampleConfig, device: torch.device) -> None:
    """Sample and write the mp4; the first rank does the writing."""
    first = torch.distributed.get_rank() == 0
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    find_checkpoint(config.checkpoint)
    if config.out.is_dir():
        raise ValueError(f"out: {config.out} is a folder; name an .mp4 file")
    check_writable(config.out.parent)
    with Progress(console=console, disable=not first or not console.is_terminal) as progress:
        video = sample_video(config, device, progress=progress)
    if first:
        encoder = write_mp4(config.out, video, config.fps)
        frames, height, width, _ = video.shape
        console.print(f"{config.out}: {frames} frames of {width}x{height}, {encoder}")


if __name__ == "__main__":
    sys.exit(run_script(sample, SampleConfig, sys.argv[1:]))
