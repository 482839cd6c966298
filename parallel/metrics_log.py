"""Where a run's figures go: metrics.jsonl, TensorBoard, and the terminal. The first rank's business."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longreel.models.config import DiTConfig
from longreel.models.publish import published
from longreel.parallel.predict.flops import useful_flops
from longreel.parallel.predict.policy import known_gpu

METRICS = "metrics.jsonl"


class MetricsLog:
    """A context manager around the training loop; on other ranks than the first it does nothing.

    Args:
        out: folder of the run. first: whether this is the first rank. console: the terminal.
        step: steps done; lines of later ones are dropped. steps: of the run. tensorboard: write its events too.
    """

    def __init__(
        self, out: Path, *, first: bool, console: Console, step: int, steps: int, tensorboard: bool = False
    ) -> None:
        self._out, self._first, self._console = out, first, console
        self._step, self._steps = step, steps
        self._tensorboard = tensorboard and first
        self._file: TextIO | None = None
        self._events: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> MetricsLog:
        if self._first:
            keep_lines_up_to(self._out / METRICS, self._step)
            self._file = self._stack.enter_context((self._out / METRICS).open("a", encoding="utf-8"))
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self._out / "tensorboard"), purge_step=self._step + 1)
            self._stack.callback(self._events.close)
        self._progress = self._stack.enter_context(
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self._console,
                disable=not self._first or not self._console.is_terminal,
            )
        )
        self._task = self._progress.add_task("train", total=self._steps, completed=self._step, figures="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def write(self, figures: Mapping[str, Any]) -> None:
        """One line of figures, `step` among them; what JSON has no word for, a figure that is not finite, is null."""
        step = figures["step"]
        if self._file is not None:
            line = {name: None if _not_finite(value) else value for name, value in figures.items()}
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in figures.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(name, value, step)
        text = self._text(figures)
        self._progress.update(self._task, figures=text)
        if not self._console.is_terminal and step % max(1, self._steps // 10) == 0:
            self.say(f"step {step}/{self._steps}  {text}")

    def moved(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def say(self, line: str) -> None:
        """A line on the terminal."""
        if self._first:
            self._console.print(line)

    def _text(self, figures: Mapping[str, Any]) -> str:
        parts = [
            f"loss {figures['loss']:.4f}",
            f"grad norm {figures['grad_norm']:.3g}",
            f"{figures['tokens_per_s']:,.0f} tokens/s",
        ]
        if "mfu" in figures:
            parts.append(f"MFU {figures['mfu']:.1%}")
        return "  ".join([*parts, f"{figures['memory'] / 2**20:,.0f} MiB"])


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def keep_lines_up_to(path: Path, step: int) -> None:
    """Drop lines that a resumed run will write again, and those of an unfinished run that left no checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # The last line may have been cut off by a crash.
        if line.endswith("}") and json.loads(line)["step"] <= step:
            kept.append(line + "\n")
    with published(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


class Utilisation:
    """Model FLOPs utilisation: useful FLOPs over what the devices could do at their peak.

    Args:
        model: trained. device: of this rank. world_size: ranks. half: whether matrices are multiplied in bf16 or fp16,
            which is what known peaks are of.
    """

    def __init__(self, model: DiTConfig, device: torch.device, world_size: int, *, half: bool) -> None:
        self._model = model
        self._peak: float | None = None
        if device.type == "cuda" and half:
            # Links do not matter here: a profile of one device will do.
            profile = known_gpu(torch.cuda.get_device_properties(device).name, 1)
            self._peak = None if profile is None else profile.matmul_flops * world_size

    def mfu(self, clips: Mapping[int, int], seconds: float) -> float | None:
        """MFU of a time in which `clips` {video tokens: number of clips} were trained; None if no peak is known."""
        if self._peak is None:
            return None
        flops = sum(useful_flops(self._model, num_video=tokens) * number for tokens, number in clips.items())
        return flops / (seconds * self._peak)


def memory_bytes(device: torch.device) -> int:
    """Peak bytes so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
