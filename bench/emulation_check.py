"""One emulated rank of one against the real one: `python bench/emulation_check.py`.

A world of one exchanges nothing, so emulation must change nothing: losses and gradients are compared bit by bit, then
steps are timed in both worlds, in turns (A B, B A, ...). On the machine's GPU with NCCL, else on its CPU with gloo.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from longreel.bench import gate
from longreel.bench.emulated_group import emulated_world
from longreel.bench.emulated_link import link_of
from longreel.bench.measure import silence_fsdp
from longreel.data.command_line import parse_arguments
from longreel.models.config import preset
from longreel.parallel.config import ParallelConfig, Policy, Precision
from longreel.parallel.mesh import build_mesh
from longreel.parallel.parallelize import Batch, ParallelDiT
from longreel.parallel.predict.hardware import get_profile
from longreel.reports.turns import compare


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """An emulated rank of one against the real one.

    Args:
        model: preset. depth: its blocks. seq_len: video tokens.
        policy: activation policy. precision: of the step. attention: provider.
        rounds: how often both worlds take their turn. steps: timed in each.
        target: whose link is emulated.
    """

    model: str = "dit-xl-2"
    depth: int = 2
    seq_len: int = 32_768
    policy: Policy = "full"
    precision: Precision = "bf16"
    attention: str = "auto"
    rounds: int = 4
    steps: int = 5
    target: str = "H800"

    def __post_init__(self) -> None:
        for name in ("depth", "seq_len", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        get_profile(self.target)
        preset(self.model)


@dataclass(slots=True)
class World:
    """What one of the worlds did. loss, gradients: of the first step. samples_s: of timed ones. memory: peak, bytes."""

    loss: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)
    samples_s: list[float] = field(default_factory=list)
    memory: int | None = None


def check(config: CheckConfig) -> tuple[World, World]:
    """The real and the emulated world, which took turns. No process group may be there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    silence_fsdp()
    real, emulated = World(), World()
    for i in range(config.rounds):
        turn = [("real", real), ("emulated", emulated)]
        for kind, world in turn[:: 1 if i % 2 == 0 else -1]:
            with _one_rank(kind, config, device):
                _steps(config, device, world)
    return real, emulated


@contextmanager
def _one_rank(kind: str, config: CheckConfig, device: torch.device) -> Iterator[None]:
    if kind == "emulated":
        with emulated_world(1, link=link_of(get_profile(config.target))):
            yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _steps(config: CheckConfig, device: torch.device, world: World) -> None:
    model_config = preset(config.model, depth=config.depth, conditioning="cross")
    parallel = ParallelConfig(policy=config.policy, precision=config.precision, attention_provider=config.attention)
    mesh = build_mesh(sp_degree=1, device_type=device.type)
    model = ParallelDiT(gate.build_model(model_config, 0).to(device), mesh, parallel)
    model.engine.attach(torch.optim.AdamW(model.parameters(), lr=1e-4))
    sample = gate.make_sample(model_config, config.seq_len, index=0, seed=0).to(device)
    batch = Batch(
        latents=sample.latents, noise=sample.noise, timestep=sample.timestep, text=sample.text, global_samples=1
    )
    loss = model.loss(batch)
    model.engine.backward(loss)
    if not world.gradients:
        world.loss = loss.item()
        world.gradients = {name: grad.cpu() for name, grad in model.engine.full_gradients().items()}
    model.engine.step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(config.steps):
        _wait(device)
        start = time.perf_counter()
        model.engine.backward(model.loss(batch))
        model.engine.step()
        _wait(device)
        world.samples_s.append(time.perf_counter() - start)
    if device.type == "cuda":
        world.memory = torch.cuda.max_memory_allocated(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def differences(real: World, emulated: World) -> list[str]:
    """What the two worlds computed differently; nothing where emulation is right."""
    found = [] if real.loss == emulated.loss else [f"loss: {real.loss!r} and {emulated.loss!r}"]
    names = real.gradients.keys() ^ emulated.gradients.keys()
    found += [f"only one world has a gradient of {name}" for name in sorted(names)]
    both = sorted(real.gradients.keys() & emulated.gradients.keys())
    unequal = (name for name in both if not torch.equal(real.gradients[name], emulated.gradients[name]))
    return found + [f"gradient of {name}" for name in unequal]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 where values differ or the times do, 2 after one `error:` line."""
    try:
        config = parse_arguments(CheckConfig, sys.argv[1:] if arguments is None else arguments)
        real, emulated = check(config)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    wrong = differences(real, emulated)
    print("values: " + ("; ".join(wrong) if wrong else "loss and every gradient are equal bit for bit"))
    found = compare(emulated.samples_s, real.samples_s)
    print(
        f"time: emulated over real {found.ratio:.4f} (95 % interval {found.low:.4f} to {found.high:.4f}), "
        f"{found.verdict}, {len(real.samples_s)} steps each"
    )
    if real.memory is not None and emulated.memory is not None:
        print(f"memory: emulated over real {emulated.memory / real.memory:.4f}, {real.memory:,} bytes")
    return 1 if wrong or found.verdict in ("FAST", "SLOW") else 0


if __name__ == "__main__":
    raise SystemExit(main())
