"""The training loop: batches, optimizer steps, one line of figures per step, checkpoints, and an orderly end."""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from longreel.kernels import resolve_attention_provider
from longreel.parallel.agreement import check_agreement
from longreel.parallel.batches import Prefetched, check_same_clips
from longreel.parallel.checkpoint import checkpoints
from longreel.parallel.checkpoint_writer import CheckpointWriter, remove_unfinished
from longreel.parallel.clip_sources import Source, open_source
from longreel.parallel.comm import all_gather, world
from longreel.parallel.config import HALF_PRECISIONS, POLICIES, check_ranks
from longreel.parallel.finite_watch import FiniteWatch, write_bad_batch
from longreel.parallel.mesh import build_mesh, largest_of_node, nodes_of_ranks
from longreel.parallel.metrics_log import MetricsLog, Utilisation, memory_bytes
from longreel.parallel.parallelize import ParallelDiT
from longreel.parallel.resume import check_resumed_clips, check_same_run, checkpoint_to_resume, set_aside
from longreel.parallel.run_config import TrainConfig, to_json
from longreel.parallel.shared_folder import check_shared, check_writable
from longreel.parallel.step_trace import StepTrace
from longreel.parallel.stopping import Termination
from longreel.parallel.train_state import TrainState
from longreel.parallel.weights_file import load_initial_weights


class Trainer:
    """One training run on the ranks of the default process group; every rank builds one and calls train().

    Args:
        config: the run. device: of this rank. console: where rank 0 reports; stderr if not given.

    Raises:
        ValueError: the run cannot work: sizes, ranks, videos, captions, weights, or an earlier run in the way.
        OSError: files cannot be read, or `out` cannot be written.
    """

    def __init__(self, config: TrainConfig, device: torch.device, *, console: Console | None = None) -> None:
        self._began = time.perf_counter()
        self.config = config
        self.device = device
        config.parallel.check_heads(config.model.build().num_heads)
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

        # Everything that can be wrong is looked at before anything is written.
        resumed, remarks = checkpoint_to_resume(config, self.checkpoint_folder, self.mesh)
        resolve_attention_provider(config.parallel.attention_provider, device)
        self.source: Source = open_source(config, device, self.mesh, self._say)
        self.config = config = self.source.config
        if resumed is not None:
            # Shards say how they were compressed and how captions are read, as the checkpoint does.
            check_same_run(config, resumed)
        in_sequence = self.source.model.max_text_tokens if self.source.model.conditioning == "in_context" else 0
        check_ranks(self.source.fewest_tokens + in_sequence, config.parallel.sp_degree)
        if resumed is not None and self.source.clips is not None:
            check_resumed_clips(resumed, self.source.clips.digest, len(self.source.clips))
        torch.manual_seed(config.seed)
        model = config.model.draw(self.source.model)
        if config.init is not None and resumed is None:
            load_initial_weights(config.init, model)
        self.model = ParallelDiT(model.to(device), self.mesh, config.parallel, objective=config.objective.build())
        self.state = TrainState(self.model, config.optimizer, config.steps)
        if resumed is not None:
            self.state.load(resumed)
        scaled = self.model.engine.loss_scale is not None
        self._watch = FiniteWatch(world(), device, scaled_loss=scaled)
        self._loss_since_save = torch.zeros((), dtype=torch.float64, device=device)
        # Of the steps since the last whole checkpoint, up to the newest that was begun; and that one's step.
        self._loss_unsaved = torch.zeros_like(self._loss_since_save)
        self._saved_at = self.step
        self._being_saved: int | None = None

        check_writable(config.out)
        check_shared(config.out, self.mesh)
        if self.checkpoint_folder.exists():
            check_writable(self.checkpoint_folder)
            if self._first:
                remove_unfinished(self.checkpoint_folder)
                if resumed is not None:
                    set_aside(resumed, self.checkpoint_folder)
        for remark in remarks:
            self._say(remark if resumed is None else f"{remark}; going back to {resumed.name}")
        self.clips = self.source.ready()
        check_same_clips(self.clips, self.mesh)
        self.batches = Prefetched(self.source.batches(self.model.objective, device))
        half = config.parallel.precision in HALF_PRECISIONS
        self._utilisation = Utilisation(self.source.model, device, self.mesh.flat.size(), half=half)
        self._writer = CheckpointWriter(
            self.checkpoint_folder,
            self.mesh.flat,
            keep=config.keep,
            keep_best=config.keep_best,
            background=config.background_save,
        )

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints go."""
        return self.config.out / "checkpoints"

    def train(self) -> Path:
        """Train up to config.steps, or until SIGTERM.

        Returns:
            The last checkpoint.

        Raises:
            ValueError: the loss, the gradients or a parameter are not finite any more; checkpoints are left as they
                are, and the batch is described in `out`.
            VideoError: a clip cannot be decoded.
            OSError: metrics, or the last checkpoint, cannot be written.
        """
        config = self.config
        with ExitStack() as stack:
            log = stack.enter_context(
                MetricsLog(
                    config.out,
                    first=self._first,
                    console=self._console,
                    step=self.step,
                    steps=config.steps,
                    tensorboard=config.tensorboard,
                )
            )
            stack.callback(self.batches.close)
            stack.callback(self._finish_saving)
            termination = stack.enter_context(Termination(world()))
            trace = StepTrace(config.profile, config.profile_steps, rank=self.mesh.flat.get_rank(), device=self.device)
            self._introduce()
            started_at, pace = self.step, _Pace()
            while self.step < config.steps:
                with trace.step(self.step + 1):
                    loss, norm = self.train_step()
                pace.add(self.batches.clips_by_tokens(self.step - 1))
                if self.step == started_at + 1 and started_at:
                    loss.item()
                    self._say(f"first step after {time.perf_counter() - self._began:.1f} s")
                stop = termination.agreed()
                last = stop or self.step == config.steps
                if self.step % config.log_every == 0 or last:
                    log.write(self._figures(loss, norm) | pace.figures(self._utilisation))
                    self._check_finite()
                    pace = _Pace()
                log.moved(self.step)
                if self.step % config.checkpoint_every == 0 or last:
                    self._save(last=last)
                    # What saving took is not training's time.
                    pace = _Pace()
                if stop:
                    if self.step < config.steps:
                        self._say(f"stopped by SIGTERM after step {self.step}; --resume goes on from there")
                    break
        saved = checkpoints(self.checkpoint_folder)[-1]
        self._say(f"checkpoint: {saved}")
        return saved

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step.

        Returns:
            (this rank's share of the loss, whose mean over all ranks is the loss; norm of all gradients).
        """
        loss, norm = self.state.advance(self.batches.micro_batches(self.step))
        self._watch.note(self.step, loss, norm)
        self._loss_since_save += loss.double()
        return loss, norm

    def _introduce(self) -> None:
        self._say(
            f"{len(self.clips)} clips, {self.source.told}; "
            f"{self.mesh.dp_degree} data-parallel x {self.mesh.sp_degree} sequence-parallel ranks"
            + (f"; resumed after step {self.step}" if self.step else "")
        )
        if self.config.policy_reason is not None:
            self._say(f"policy {self.config.policy_reason}")

    def _figures(self, loss: torch.Tensor, norm: torch.Tensor) -> dict[str, Any]:
        """Figures of a step over all ranks; waits for the device."""
        numbers = [
            loss.double(),
            float(memory_bytes(self.device)),
            float(self.model.store.pinned_bytes),
        ]
        share = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=loss.device) for n in numbers])
        everyone = all_gather(share, self.mesh.flat.get_group().group_name)
        figures: dict[str, Any] = {
            "step": self.step,
            "loss": float(everyone[:, 0].mean()),
            "grad_norm": float(norm),
            "learning_rate": self.state.optimizer.param_groups[0]["lr"],
            "memory": int(everyone[:, 1].max()),
        }
        if self.config.policy_reason is not None:
            figures["policy"] = self.config.parallel.policy
        if (scale := self.model.engine.loss_scale) is not None:
            figures["loss_scale"] = scale
            figures["skipped_steps"] = self._watch.skipped_steps
            if not math.isfinite(figures["grad_norm"]):
                self._say(f"step {self.step} left out: gradients overflowed; the loss is now scaled by {scale:g}")
        if self.config.parallel.policy == "offload":
            figures["host_memory"] = int(everyone[:, 2].max())
            figures["host_memory_of_node"] = largest_of_node(everyone[:, 2].tolist(), self._nodes)
        return figures

    def _check_finite(self, *, parameters: bool = False) -> None:
        """ValueError on every rank if any rank met a loss or gradients that are not finite, or holds such a parameter.

        Which samples the step was made of is written to `out`.
        """
        found = self._watch.check(self.step, self.model.parameters() if parameters else ())
        if found is None:
            return
        step, what, ranks = found
        self._settle()
        if self._first:
            path = write_bad_batch(self.config.out, step, what, ranks, self.batches.describe)
            self._say(f"the samples of step {step} are in {path}")
        raise ValueError(
            f"{what}; what was saved up to step {self._saved_at} stays; use a learning_rate below "
            f"{self.config.optimizer.learning_rate}, or clip_norm"
        )

    def _save(self, *, last: bool) -> None:
        self._check_finite(parameters=True)
        self._settle()
        self._loss_unsaved += self._loss_since_save
        self._loss_since_save.zero_()
        mean = self._loss_unsaved / max(1, self.step - self._saved_at)
        score = float(all_gather(mean.reshape(1), self.mesh.flat.get_group().group_name).mean())
        config = to_json(self.config) | {
            "clips": self.clips.digest,
            "dit": to_json(self.source.model),
            "clip_size": self.source.clip_size,
        }
        try:
            self._writer.save(self.step, self.state.state(), config, score=score)
            self._being_saved = self.step
            if last:
                self._writer.wait()
        except OSError as error:
            if last:
                raise
            self._warn_unsaved(error)

    def _settle(self) -> None:
        """Wait for the checkpoint that is being written, and count as saved only what is there."""
        step, self._being_saved = self._being_saved, None
        try:
            self._writer.wait()
        except OSError as error:
            self._warn_unsaved(error)
            return
        if step is not None:
            self._saved_at = step
            self._loss_unsaved.zero_()

    def _warn_unsaved(self, error: OSError) -> None:
        """The next one may find room; what is there stays as it is."""
        self._say(f"warning: {error}; training goes on")

    def _finish_saving(self) -> None:
        """However training ends, a checkpoint that is being written becomes whole if its ranks live."""
        try:
            self._writer.close()
        except OSError as error:
            self._say(f"warning: {error}")

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

    def _say(self, line: str) -> None:
        if self._first:
            self._console.print(line)


class _Pace:
    """Time and tokens since the figures before."""

    def __init__(self) -> None:
        self._began, self._steps = time.perf_counter(), 0
        self._trained: Counter[int] = Counter()

    def add(self, clips_by_tokens: dict[int, int]) -> None:
        """Count a step of the clips {video tokens: number}."""
        self._steps += 1
        self._trained.update(clips_by_tokens)

    def figures(self, utilisation: Utilisation) -> dict[str, float]:
        """Seconds of a step, tokens a second over all ranks, and MFU where the devices' peak is known."""
        seconds = time.perf_counter() - self._began
        tokens = sum(tokens * number for tokens, number in self._trained.items())
        mfu = utilisation.mfu(self._trained, seconds)
        figures = {"seconds": seconds / self._steps, "tokens_per_s": tokens / seconds}
        return figures if mfu is None else figures | {"mfu": mfu}


def train(config: TrainConfig, device: torch.device) -> None:
    """Train as configured and say how to sample from the result."""
    trainer = Trainer(config, device)
    trainer.train()
    caption = trainer.clips[0].captions[0]
    trainer._say(f'sample it: python parallel/sample.py --checkpoint {config.out} --prompt "{caption}"')
