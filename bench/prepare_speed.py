"""What several processes save when videos are prepared: `python bench/prepare_speed.py`.

Runs data/prepare.py, as a command and from its start to its end, over drawn H.264 videos of 640x360 and 240 frames: by
one process and by several, in rounds A B B A.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional as F

from longreel.data.command_line import run_command
from longreel.data.mp4 import write_mp4

_FRAMES, _HEIGHT, _WIDTH = 240, 360, 640
_SCRIPTS = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSpeedConfig:
    """Seconds of data/prepare.py by one process and by several.

    Args:
        autoencoder: raw, which writes 166 MB for each video, or vqvae of the default size, of which every 16th frame is
            encoded.
        videos: how many. processes: how many beside one; by default as many as there are cores.
        rounds: times that A B B A is run.
        folder: where a temporary folder is made for videos and shards; by default the system's.
        least: exit with an error if several are less than so many times as fast as one; 0 only tells.
    """

    autoencoder: Literal["raw", "vqvae"] = "raw"
    videos: int = 128
    processes: int | None = None
    rounds: int = 1
    folder: Path | None = None
    least: float = 0.0

    def __post_init__(self) -> None:
        for name in ("videos", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.processes is not None and self.processes < 2:
            raise ValueError(f"processes must be at least 2, to compare with one, got {self.processes}")
        if not self.least >= 0:
            raise ValueError(f"least must not be negative, got {self.least}")


def measure(config: PrepareSpeedConfig) -> None:
    """Print seconds of each run and the ratio of the medians; ValueError if that is below config.least."""
    processes = config.processes or max(2, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory(dir=config.folder) as temporary:
        folder = Path(temporary)
        need = config.videos * _FRAMES * _HEIGHT * _WIDTH * 3 if config.autoencoder == "raw" else 0
        if need > (free := shutil.disk_usage(folder).free):
            raise ValueError(
                f"videos {config.videos} become {need / 1e9:.1f} GB, and there are {free / 1e9:.1f} GB left in "
                f"{folder.parent}; use fewer, or --folder of a larger disk"
            )
        options = _draw_videos(folder, config)
        seconds: dict[int, list[float]] = {1: [], processes: []}
        for _ in range(config.rounds):
            for count in (1, processes, processes, 1):
                seconds[count].append(_run(folder, [*options, "--processes", str(count)]))
                print(f"{count:3} processes {seconds[count][-1]:8.1f} s", flush=True)
    ratio = statistics.median(seconds[1]) / statistics.median(seconds[processes])
    print(f"{processes} processes are {ratio:.2f} times as fast as one")
    if ratio < config.least:
        raise ValueError(f"{ratio:.2f} times as fast; at least {config.least:g} was asked for")


def _draw_videos(folder: Path, config: PrepareSpeedConfig) -> list[str]:
    """Make the folder of videos, and the weights that they are encoded with; the options of data/prepare.py."""
    videos = folder / "videos"
    videos.mkdir()
    noise = torch.randn(1, 3, _HEIGHT // 8, _WIDTH // 4, generator=torch.Generator().manual_seed(0))
    wide = F.interpolate(noise, size=(_HEIGHT, 2 * _WIDTH), mode="bicubic")[0].movedim(0, -1).clamp(-1, 1)
    frames = torch.stack([wide[:, 2 * frame : 2 * frame + _WIDTH] for frame in range(_FRAMES)])
    write_mp4(videos / "0.mp4", frames, 24)
    for number in range(1, config.videos):
        shutil.copy(videos / "0.mp4", videos / f"{number}.mp4")
    words = ["a pattern moves to the left"]
    captions = [{"file": f"{number}.mp4", "captions": words} for number in range(config.videos)]
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    if config.autoencoder == "raw":
        return []
    # How good its codes are does not matter here.
    _call("train_vqvae.py", [str(videos), str(folder / "vqvae"), "--steps", "1"])
    return [*("--autoencoder", "vqvae", "--autoencoder-path", str(folder / "vqvae")), *("--frame-stride", "16")]


def _run(folder: Path, options: list[str]) -> float:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    # What the last run wrote is on its way to the disk.
    os.sync()
    began = time.perf_counter()
    _call("prepare.py", [str(folder / "videos"), str(folder / "captions.json"), str(out), *options])
    return time.perf_counter() - began


def _call(script: str, args: list[str]) -> None:
    done = subprocess.run([sys.executable, str(_SCRIPTS / script), *args], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{script} failed: {(done.stderr.splitlines() or [str(done.returncode)])[-1]}")


if __name__ == "__main__":
    sys.exit(run_command(measure, PrepareSpeedConfig, sys.argv[1:]))
