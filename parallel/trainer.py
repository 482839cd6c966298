"""The training loop: rectified flow on raw pixels, AdamW, one line of metrics per step, checkpoints."""

from __future__ import annotations

import json
import math
import os
import resource
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.distributed.tensor import DTensor

from longreel.data.captions import load_captions
from longreel.data.clips import ClipDataset
from longreel.data.demo import make_demo_folder
from longreel.kernels import resolve_attention_provider
from longreel.models.dit import DiT
from longreel.models.text import ByteTextEncoder
from longreel.parallel.agreement import check_agreement
from longreel.parallel.batches import build_batch, check_same_clips, split_samples
from longreel.parallel.checkpoint import (
    checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_run,
    save_checkpoint,
    wait_for_all,
)
from longreel.parallel.comm import all_gather
from longreel.parallel.config import POLICIES, check_ranks
from longreel.parallel.mesh import build_mesh, largest_of_node, nodes_of_ranks
from longreel.parallel.parallelize import ParallelDiT
from longreel.parallel.run_config import TrainConfig, to_json
from longreel.parallel.shared_folder import check_shared
from longreel.parallel.step_trace import StepTrace

# What may differ between a run and its continuation: where things are, how long it goes on, how it is spread.
_FREE_ON_RESUME = {
    "videos",
    "captions",
    "out",
    "resume",
    "steps",
    "checkpoint_every",
    "keep",
    "log_every",
    "timeout_s",
    "profile",
    "profile_steps",
    "parallel",
    "policy_reason",
}


class Trainer:
    """One training run on the ranks of the default process group; every rank builds one and calls train().

    Args:
        config: the run. device: of this rank. console: where rank 0 reports; stderr if not given.

    Raises:
        ValueError: the run cannot work: sizes, ranks, videos, captions, or an earlier run in the way.
        OSError: files cannot be read, or `out` cannot be written.
    """

    def __init__(self, config: TrainConfig, device: torch.device, *, console: Console | None = None) -> None:
        self.config = config
        self.device = device
        model_config = config.model.build()
        config.parallel.check_heads(model_config.num_heads)
        in_sequence = config.model.max_text_tokens if config.model.conditioning == "in_context" else 0
        check_ranks(config.tokens_per_sample + in_sequence, config.parallel.sp_degree)
        self._nodes = nodes_of_ranks()
        self.mesh = build_mesh(
            sp_degree=config.parallel.sp_degree,
            ulysses_degree=config.parallel.ulysses_degree,
            device_type=device.type,
            nodes=self._nodes,
            sp_across_nodes=config.parallel.sp_across_nodes,
        )
        self._first = self.mesh.flat.get_rank() == 0
        self._check_same_policy()
        self._console = console or Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        split_samples(config.batch_size, self.mesh.dp_degree, self.mesh.dp_rank)

        # Everything that can be wrong is looked at before anything is written.
        resumed = self._earlier_run()
        clips = None if config.demo else self._open_clips(*self._sources())
        if resumed is not None and clips is not None:
            self._check_resumed_clips(resumed, clips)
        resolve_attention_provider(config.parallel.attention_provider, device)
        self.encoder = ByteTextEncoder(model_config.text_dim, model_config.max_text_tokens)
        torch.manual_seed(config.seed)
        self.model = ParallelDiT(DiT(model_config).to(device), self.mesh, config.parallel)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.model.engine.attach(self.optimizer)
        self.step = 0
        if resumed is not None:
            load_checkpoint(resumed, self.model.engine)
            self.step = read_run(resumed)[0]
        self._first_bad_step = torch.tensor(math.inf, dtype=torch.float64, device=device)

        check_writable(config.out)
        check_shared(config.out, self.mesh)
        if self.checkpoint_folder.exists():
            check_writable(self.checkpoint_folder)
        self.clips = clips or self._open_clips(*self._draw_demo())
        check_same_clips(self.clips, self.mesh)

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints go."""
        return self.config.out / "checkpoints"

    def train(self) -> Path:
        """Train up to config.steps.

        Returns:
            The last checkpoint.

        Raises:
            ValueError: the loss or a parameter is not finite any more; checkpoints are left as they are.
            VideoError: a clip cannot be decoded.
            OSError: metrics or checkpoints cannot be written.
        """
        config = self.config
        if self._first:
            self._keep_metrics_up_to(self.step)
            self._say(
                f"{len(self.clips)} clips, {config.tokens_per_sample} tokens each; "
                f"{self.mesh.dp_degree} data-parallel x {self.mesh.sp_degree} sequence-parallel ranks"
                + (f"; resumed after step {self.step}" if self.step else "")
            )
            if config.policy_reason is not None:
                self._say(f"policy {config.policy_reason}")
        metrics = (config.out / "metrics.jsonl").open("a", encoding="utf-8") if self._first else nullcontext()
        saved: Path | None = None
        with metrics as file, self._progress() as progress:
            task = progress.add_task("train", total=config.steps, completed=self.step, figures="")
            began, since = time.perf_counter(), self.step
            trace = StepTrace(config.profile, config.profile_steps, rank=self.mesh.flat.get_rank(), device=self.device)
            while self.step < config.steps:
                with trace.step(self.step + 1):
                    loss = self.train_step()
                if self.step % config.log_every == 0 or self.step == config.steps:
                    figures = self._figures(loss)
                    seconds = time.perf_counter() - began
                    figures["seconds"] = seconds / (self.step - since)
                    figures["tokens_per_s"] = config.batch_size * config.tokens_per_sample / figures["seconds"]
                    began, since = time.perf_counter(), self.step
                    if file is not None:
                        file.write(json.dumps(figures) + "\n")
                        file.flush()
                    self._show(progress, figures)
                    if not math.isfinite(figures["loss"]):
                        raise ValueError(
                            f"the loss is {figures['loss']} at step {self.step}; use a learning_rate below "
                            f"{config.learning_rate}"
                        )
                progress.update(task, completed=self.step)
                if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    saved = self._save()
                    began = time.perf_counter()
        if saved is None:
            saved = checkpoints(self.checkpoint_folder)[-1]
        self._say(f"checkpoint: {saved}")
        return saved

    def train_step(self) -> torch.Tensor:
        """One optimizer step; returns this rank's share of the loss, whose mean over all ranks is the loss."""
        config = self.config
        batch = build_batch(
            self.clips,
            self.encoder,
            seed=config.seed,
            step=self.step,
            batch_size=config.batch_size,
            caption_dropout=config.caption_dropout,
            mesh=self.mesh,
            device=self.device,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (self.step + 1) / (config.warmup_steps + 1))
        loss = self.model.loss(batch)
        self.model.engine.backward(loss)
        self.model.engine.step()
        self.step += 1
        # Noted on the device: waiting for every step's loss would stall it.
        bad = torch.where(loss.detach().isfinite(), math.inf, float(self.step))
        self._first_bad_step = torch.minimum(self._first_bad_step, bad)
        return loss.detach()

    def _figures(self, loss: torch.Tensor) -> dict[str, Any]:
        """Global loss, largest memory of any rank, host memory where activations go there; waits for the device."""
        numbers = [loss.double(), float(memory_bytes(self.device)), float(self.model.store.pinned_bytes)]
        share = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=loss.device) for n in numbers])
        everyone = all_gather(share, self.mesh.flat.get_group().group_name)
        figures: dict[str, Any] = {
            "step": self.step,
            "loss": float(everyone[:, 0].mean()),
            "memory": int(everyone[:, 1].max()),
        }
        if self.config.policy_reason is not None:
            figures["policy"] = self.config.parallel.policy
        if (scale := self.model.engine.loss_scale) is not None:
            figures["loss_scale"] = scale
        if self.config.parallel.policy == "offload":
            figures["host_memory"] = int(everyone[:, 2].max())
            figures["host_memory_of_node"] = largest_of_node(everyone[:, 2].tolist(), self._nodes)
        return figures

    def _check_finite(self) -> None:
        """ValueError on every rank if any rank met a loss that is not finite, or holds such a parameter."""
        with torch.no_grad():
            finite = [local_part(p).isfinite().all() for p in self.model.parameters()]
        share = torch.stack([self._first_bad_step, torch.stack(finite).all().double()])
        everyone = all_gather(share, self.mesh.flat.get_group().group_name)
        bad_step, all_finite = float(everyone[:, 0].min()), bool(everyone[:, 1].all())
        if math.isfinite(bad_step):
            what = f"the loss is not finite at step {int(bad_step)}"
        elif not all_finite:
            what = f"the parameters are not finite at step {self.step}"
        else:
            return
        raise ValueError(
            f"{what}, so step {self.step} is not saved; use a learning_rate below {self.config.learning_rate}"
        )

    def _save(self) -> Path:
        self._check_finite()
        flat = self.mesh.flat
        config = to_json(self.config) | {"clips": self.clips.digest}
        saved = save_checkpoint(self.checkpoint_folder, self.step, self.model.engine, config, flat)
        if self._first:
            prune_checkpoints(self.checkpoint_folder, self.config.keep)
        return saved

    def _earlier_run(self) -> Path | None:
        """The checkpoint to go on from; ValueError when `out` holds another run or none to resume."""
        config = self.config
        found = checkpoints(self.checkpoint_folder)
        self._check_same_runs(found)
        if not config.resume:
            if found:
                raise ValueError(
                    f"{config.out}: holds a run already ({found[-1].name}); use --resume to go on with it, "
                    "or another --out"
                )
            return None
        if not found:
            raise ValueError(f"{config.out}: no checkpoint to resume from")
        step, before = read_run(found[-1])
        if step > config.steps:
            raise ValueError(f"{found[-1]}: has {step} steps already, and steps is {config.steps}")
        runs = before, to_json(config)
        before, now = (run | {"precision": run.get("parallel", {}).get("precision")} for run in runs)
        for name in now.keys() - _FREE_ON_RESUME:
            if before.get(name) != now[name]:
                raise ValueError(
                    f"cannot resume with another {name}: the run in {config.out} has {before.get(name)}, "
                    f"the command line {now[name]}"
                )
        return found[-1]

    def _check_same_policy(self) -> None:
        """ValueError if ranks with different devices or memory chose different policies."""
        policy = POLICIES.index(self.config.parallel.policy) if self.config.policy_reason is not None else 0
        try:
            check_agreement("policies", [policy], self.mesh.flat.get_group().group_name, self.device)
        except ValueError as error:
            raise ValueError(
                "policy 'auto' comes out differently where ranks have different memory; give --memory-limit-gib and "
                f"--host-memory-gib, or name a policy: {error}"
            ) from error

    def _check_same_runs(self, found: list[Path]) -> None:
        """ValueError if ranks see different checkpoints in `out`."""
        steps = [int(path.name.partition("-")[2]) for path in found]
        try:
            check_agreement("steps of checkpoints", steps, self.mesh.flat.get_group().group_name, self.device)
        except ValueError as error:
            raise ValueError(
                f"out: {self.config.out} is not one folder for all ranks; put it on a file system that all nodes "
                f"share: {error}"
            ) from error

    def _check_resumed_clips(self, resumed: Path, clips: ClipDataset) -> None:
        if read_run(resumed)[1].get("clips") != clips.digest:
            raise ValueError(
                f"cannot resume with other videos or captions: {resumed} was trained on other clips than the "
                f"{len(clips)} given; give the same ones, or another --out to start a new run"
            )

    def _sources(self) -> tuple[Path, Path]:
        """(folder of videos, captions file)."""
        folder = self.config.videos
        assert folder is not None
        if not folder.is_dir():
            raise ValueError(f"videos: {folder} is not a folder")
        return folder, self.config.captions or folder / "captions.json"

    def _draw_demo(self) -> tuple[Path, Path]:
        folder = self.config.out / "demo"
        if self._first:
            make_demo_folder(folder)
        wait_for_all(self.mesh.flat)
        return folder, folder / "captions.json"

    def _open_clips(self, folder: Path, captions: Path) -> ClipDataset:
        config = self.config
        files = load_captions(captions)
        clips = ClipDataset(
            folder,
            files,
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            stride=config.frame_stride,
        )
        if clips.skipped:
            self._say(f"skipped {len(clips.skipped)} of {len(files)} videos:")
            for name, reason in clips.skipped:
                self._say(f"  {name}: {reason}")
        return clips

    def _keep_metrics_up_to(self, step: int) -> None:
        """Drop lines that a resumed run will write again, and those of an unfinished run that left no checkpoint."""
        path = self.config.out / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            # The last line may have been cut off by a crash.
            if line.endswith("}") and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._first or not self._console.is_terminal,
        )

    def _show(self, progress: Progress, figures: dict[str, Any]) -> None:
        text = (
            f"loss {figures['loss']:.4f}  {figures['tokens_per_s']:,.0f} tokens/s  {figures['memory'] / 2**20:,.0f} MiB"
        )
        progress.update(progress.task_ids[0], figures=text)
        if not self._console.is_terminal and self.step % max(1, self.config.steps // 10) == 0:
            self._say(f"step {self.step}/{self.config.steps}  {text}")

    def _say(self, line: str) -> None:
        if self._first:
            self._console.print(line)


def train(config: TrainConfig, device: torch.device) -> None:
    """Train as configured and say how to sample from the result."""
    trainer = Trainer(config, device)
    trainer.train()
    _, captions = trainer.clips[0]
    trainer._say(f'sample it: python parallel/sample.py --checkpoint {config.out} --prompt "{captions[0]}"')


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def memory_bytes(device: torch.device) -> int:
    """Peak bytes so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_writable(folder: Path) -> None:
    """Create a folder if needed and make sure that files can be written there; OSError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder}: cannot be written: {error.strerror}") from error
