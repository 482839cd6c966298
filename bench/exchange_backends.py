"""Exchange back ends against each other: one self-attention layer, forward and with backward, on this machine's ranks.

    torchrun --nproc-per-node 8 bench/exchange_backends.py --strategy fastseq --rows 12800

Back ends take turns; a sample is the slowest rank's. Each is checked against the first one bit by bit before it is
timed. On CUDA a profiler then says what moved the bytes: `Memcpy PtoP` is copy engines, `nccl...` kernels on SMs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from longreel.models.sequence import SequenceLengths, SequenceParallel
from longreel.parallel import comm
from longreel.parallel.config import DTYPES, Exchange, ParallelConfig, Precision
from longreel.parallel.launch import run_script
from longreel.parallel.mesh import build_mesh
from longreel.parallel.strategies import build_strategy

# What the names of a profiler's events are counted as.
MOVERS = ("Memcpy PtoP", "Memcpy DtoD", "ncclDevKernel", "put_signal", "wait_signal")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeConfig:
    """Times of exchange back ends over all ranks.

    Args:
        strategy: what exchanges. exchanges: back ends, the first of which the others must equal.
        rows: tokens of one rank. hidden, num_heads: of the layer; DiT-XL/2's by default.
        precision: of x and the weights. repeats: samples of each.
    """

    strategy: Literal["fastseq", "ring"] = "fastseq"
    exchanges: tuple[Exchange, ...] = ("p2p", "symmetric")
    rows: int = 12_800
    hidden: int = 1152
    num_heads: int = 16
    precision: Precision = "bf16"
    repeats: int = 20

    def __post_init__(self) -> None:
        for name in ("rows", "hidden", "num_heads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % self.num_heads:
            raise ValueError(f"hidden {self.hidden} must be a multiple of num_heads {self.num_heads}")
        if not self.exchanges:
            raise ValueError("exchanges must name at least one back end: p2p, symmetric")


class Layer:
    """One self-attention layer under one back end."""

    def __init__(self, config: ExchangeConfig, exchange: Exchange, device: torch.device) -> None:
        degree, dtype = dist.get_world_size(), DTYPES[config.precision]
        parallel = ParallelConfig(strategy=config.strategy, sp_degree=degree, exchange=exchange)
        self._sp: SequenceParallel = build_strategy(parallel, build_mesh(sp_degree=degree, device_type=device.type))
        self._lengths = SequenceLengths(valid=degree * config.rows, padded=degree * config.rows)
        self._heads = config.num_heads
        torch.manual_seed(0)
        self._qkv = nn.Linear(config.hidden, 3 * config.hidden, device=device, dtype=dtype)
        torch.manual_seed(1 + dist.get_rank())
        self._x = torch.randn(1, config.rows, config.hidden, device=device, dtype=dtype, requires_grad=True)

    def forward(self) -> list[Tensor]:
        """Without a graph."""
        with torch.no_grad():
            return [self._sp.self_attention(self._x, self._qkv, num_heads=self._heads, lengths=self._lengths)]

    def step(self) -> list[Tensor]:
        """Output and gradients."""
        out = self._sp.self_attention(self._x, self._qkv, num_heads=self._heads, lengths=self._lengths)
        return [out, *torch.autograd.grad(out, [self._x, *self._qkv.parameters()], torch.ones_like(out))]


def slowest_s(layer: Layer, call: Literal["forward", "step"], device: torch.device) -> float:
    """Seconds of one call on the slowest rank; all start together."""
    group = comm.world()
    synchronize(device)
    comm.over_ranks(0.0, group, device)
    synchronize(device)
    start = time.perf_counter()
    getattr(layer, call)()
    synchronize(device)
    return max(comm.over_ranks(time.perf_counter() - start, group, device))


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def movers(layer: Layer, device: torch.device) -> str:
    """Milliseconds of one step on this rank's device, by what moved bytes."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        layer.step()
        synchronize(device)
    totals = dict.fromkeys(MOVERS, 0.0)
    for event in profiled.key_averages():
        for name in MOVERS:
            if name in event.key:
                totals[name] += event.self_device_time_total * 1e-3
    return ", ".join(f"{name} {ms:.2f} ms" for name, ms in totals.items())


def work(config: ExchangeConfig, device: torch.device) -> None:
    """Check, time and print; every rank calls it."""
    first = dist.get_rank() == 0
    layers = {exchange: Layer(config, exchange, device) for exchange in config.exchanges}
    results = {exchange: layer.step() for exchange, layer in layers.items()}
    expected = results[config.exchanges[0]]
    for exchange, found in results.items():
        same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        if not all(comm.over_ranks(float(same), comm.world(), device)):
            raise RuntimeError(f"exchange {exchange!r} differs from {config.exchanges[0]!r}: nothing was timed")
    results.clear()
    samples: dict[tuple[str, str], list[float]] = {(e, c): [] for e in layers for c in ("forward", "step")}
    for repeat in range(config.repeats):
        # A B B A: a drift of the clock weighs on all alike.
        for exchange in config.exchanges[:: 1 if repeat % 2 else -1]:
            for call in ("forward", "step"):
                samples[exchange, call].append(slowest_s(layers[exchange], call, device))
    for exchange, layer in layers.items():
        moved = movers(layer, device) if device.type == "cuda" else "no device to profile"
        if first:
            times = [samples[exchange, call] for call in ("forward", "step")]
            told = [f"{statistics.median(t) * 1e3:.2f} ({min(t) * 1e3:.2f}-{max(t) * 1e3:.2f}) ms" for t in times]
            print(f"{exchange:10} forward {told[0]}, with backward {told[1]}; {moved}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one `error:` line."""
    return run_script(work, ExchangeConfig, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    raise SystemExit(main())
