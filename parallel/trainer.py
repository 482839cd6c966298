"""The training loop: batches, optimizer steps, one line of figures per step, checkpoints, and an orderly end."""

from __future__ import annotations

import math
import shlex
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from longreel.kernels import resolve_attention_provider
from longreel.models.dit import DiT
from longreel.parallel.agreement import check_agreement
from longreel.parallel.batches import check_same_clips
from longreel.parallel.broken_clips import BROKEN_CLIPS, BrokenClips, LostClips
from longreel.parallel.checkpoint import checkpoints
from longreel.parallel.clip_sources import Source, open_source
from longreel.parallel.comm import all_gather, world
from longreel.parallel.config import HALF_PRECISIONS, POLICIES, check_ranks
from longreel.parallel.config_json import to_json
from longreel.parallel.finite_watch import FiniteWatch, write_bad_batch
from longreel.parallel.mesh import build_mesh, largest_of_node, nodes_of_ranks
from longreel.parallel.metrics_log import MetricsLog, Utilisation, memory_bytes
from longreel.parallel.pace import Pace, process_age
from longreel.parallel.parallelize import ParallelDiT
from longreel.parallel.prefetch import AgreedBatches, Prefetched
from longreel.parallel.resume import check_resumed_clips, check_same_encoders, check_same_run, checkpoint_to_resume
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.run_folder import enter_run_folder
from longreel.parallel.saving import Saving
from longreel.parallel.step_trace import StepTrace
from longreel.parallel.stopping import Termination
from longreel.parallel.train_state import TrainState
from longreel.parallel.weights_file import load_initial_weights

# Characters of a caption that is shown whole.
LONGEST_PROMPT = 200


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
        earlier = checkpoint_to_resume(config, self.checkpoint_folder, self.mesh)
        resumed = earlier.checkpoint
        resolve_attention_provider(config.parallel.attention_provider, device)
        self.source: Source = open_source(config, device, self.mesh, self._say)
        self.config = config = self.source.config
        if resumed is not None:
            # Shards say how they were compressed and how captions are read, as the checkpoint does.
            check_same_run(config, resumed)
            check_same_encoders(resumed, self.source.encoder_weights)
        in_sequence = self.source.model.max_text_tokens if self.source.model.conditioning == "in_context" else 0
        check_ranks(self.source.fewest_tokens + in_sequence, config.parallel.sp_degree)
        if resumed is not None and self.source.clips is not None:
            check_resumed_clips(resumed, self.source.clips.digest, len(self.source.clips))
        torch.manual_seed(config.seed)
        model = DiT(self.source.model)
        if config.init is not None and resumed is None:
            load_initial_weights(config.init, model, to_json(config))
        self.model = ParallelDiT(model.to(device), self.mesh, config.parallel, objective=config.objective.build())
        self.state = TrainState(self.model, config.optimizer, config.steps)
        if resumed is not None:
            self.state.load(resumed)
        self._watch = FiniteWatch(world(), device)

        self._lock = enter_run_folder(config.out, self.checkpoint_folder, self.mesh, earlier, config.resume, self._say)
        with ExitStack() as undo:
            undo.push(self._lock)
            for remark in earlier.remarks:
                self._say(remark if resumed is None else f"{remark}; going back to {resumed.name}")
            self.clips = self.source.ready()
            check_same_clips(self.clips, self.mesh)
            self.batches = self._open_batches()
            half = config.parallel.precision in HALF_PRECISIONS
            self._utilisation = Utilisation(self.source.model, device, self.mesh.flat.size(), half=half)
            self._saving = Saving(
                self.checkpoint_folder, self.mesh.flat, config, step=self.step, device=device, say=self._say
            )
            undo.pop_all()

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
            LostClips: clips cannot be read any more that no others take the place of; what was trained is saved.
            OSError: metrics, or the last checkpoint, cannot be written.
        """
        config = self.config
        with ExitStack() as stack:
            # Given up last, when nothing writes any more.
            stack.push(self._lock)
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
            stack.callback(self._saving.close)
            termination = stack.enter_context(Termination(world()))
            trace = StepTrace(config.profile, config.profile_steps, rank=self.mesh.flat.get_rank(), device=self.device)
            self._introduce()
            started_at, pace, began = self.step, Pace(), dict[str, float]()
            while self.step < config.steps:
                with trace.step(self.step + 1):
                    loss, norm = self._step_or_save()
                pace.add(self.batches.clips_by_tokens(self.step - 1))
                if self.step == started_at + 1:
                    loss.item()
                    began = {"first_step_after": process_age()}
                    self._say(
                        f"first step {began['first_step_after']:.1f} s after the process began, "
                        f"{time.perf_counter() - self._began:.1f} s after the run was opened"
                    )
                stop = termination.agreed()
                last = stop or self.step == config.steps
                if self.step % config.log_every == 0 or last:
                    log.write(self._figures(loss, norm) | pace.figures(self._utilisation) | began)
                    self._check_finite()
                    pace, began = Pace(), {}
                log.moved(self.step)
                if self.step % config.checkpoint_every == 0 or last:
                    self._save(last=last)
                    # What saving took is not training's time.
                    pace = Pace()
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
        self._watch.note(self.step, loss, norm, loss_scale=self.model.engine.scaled(torch.ones_like(norm)))
        self._saving.note(loss)
        return loss, norm

    def _step_or_save(self) -> tuple[torch.Tensor, torch.Tensor]:
        """train_step(), or a checkpoint where clips are lost that it needs: on every rank, before it has begun."""
        try:
            return self.train_step()
        except LostClips as error:
            self._saving.settle()
            if self.step > self._saving.saved_at:
                self._save(last=True)
            if not self._saving.saved_at:
                raise
            raise LostClips(f"{error} (saved after step {self._saving.saved_at})") from error

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
        self._saving.settle()
        if self._first:
            path = write_bad_batch(self.config.out, step, what, ranks, self.batches.describe)
            self._say(f"the samples of step {step} are in {path}")
        raise ValueError(
            f"{what}; what was saved up to step {self._saving.saved_at} stays; use a learning_rate below "
            f"{self.config.optimizer.learning_rate}, or clip_norm"
        )

    def _save(self, *, last: bool) -> None:
        self._check_finite(parameters=True)
        config = to_json(self.config) | {
            "clips": self.clips.digest,
            "dit": to_json(self.source.model),
            "encoder_weights": self.source.encoder_weights,
            "clip_size": self.source.clip_size,
        }
        self._saving.save(self.step, self.state.state, config, last=last)

    def _open_batches(self) -> AgreedBatches:
        kept, resume = self.config.out / BROKEN_CLIPS, self.config.resume
        broken = BrokenClips(self.clips, kept, resume=resume, same_size=self.source.same_size)
        built = self.source.batches(self.model.objective, self.device, broken)
        return AgreedBatches(
            Prefetched(built, self.config.steps),
            broken,
            clips=self.clips,
            group=world(),
            first=self._first,
            say=self._say,
        )

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


def train(config: TrainConfig, device: torch.device) -> None:
    """Train as configured and say how to sample from the result."""
    trainer = Trainer(config, device)
    trainer.train()
    trainer._say(f"sample it: {sample_command(config.out, trainer.clips.captions(0)[0])}")


def sample_command(out: Path, caption: str) -> str:
    """A line for a terminal: captions may be of megabytes, and hold what moves its cursor; those are left out."""
    prompt = caption if caption.isprintable() and len(caption) <= LONGEST_PROMPT else "..."
    return shlex.join(["python", "parallel/sample.py", "--checkpoint", str(out), "--prompt", prompt])
