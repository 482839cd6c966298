"""One training step of one rank on tensors without data: the real model, strategy, engine and optimizer, and no GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longreel.models.config import DiTConfig
from longreel.models.dit import DiT, takes_text
from longreel.parallel import comm
from longreel.parallel.config import ParallelConfig
from longreel.parallel.host_slabs import in_slabs
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.offload import HostStore, HostTensor
from longreel.parallel.parallelize import Batch, ParallelDiT
from longreel.parallel.predict.ledger import OpCost, OpLedger
from longreel.parallel.predict.lifetimes import StorageTracker
from longreel.parallel.predict.shapes import ShapesOnly

_COLLECTIVES = {
    "alltoall_base_": "all_to_all",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "send": "send",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTrace:
    """What one training step does on one rank.

    Args:
        peaks: highest live bytes in `forward`, `backward` and `optimizer`.
        state: bytes that stay from step to step: parameters and optimizer state of this rank.
        kept: bytes live between forward and backward beyond `state`: activations, inputs, gathered parameters.
        costs: calls per op, phases `forward`, `backward` and `optimizer`.
        group_sizes: ranks of the process groups that the costs name. group_extents: how many consecutive ranks of the
            world each of them lies in.
        host_bytes: activations in host memory at most, which go there and come back once.
    """

    peaks: Mapping[str, int]
    state: int
    kept: int
    costs: Mapping[OpCost, int]
    group_sizes: Mapping[str, int]
    group_extents: Mapping[str, int]
    host_bytes: int

    @property
    def peak(self) -> int:
        """Highest live bytes of the step."""
        return max(self.peaks.values())

    @property
    def pinned_bytes(self) -> int:
        """Host memory that host_bytes take: whole slabs, what a budget limits and a run reports."""
        return in_slabs(self.host_bytes)

    @property
    def flops(self) -> int:
        """FLOPs this rank computes, recomputation and padding included."""
        return sum(cost.flops * calls for cost, calls in self.costs.items())

    def sent(self) -> dict[str, int]:
        """Bytes this rank sends, by part and collective: `sequence.all_to_all`, `sharding.all_gather` ..."""
        sent: Counter[str] = Counter()
        for cost, calls in self.costs.items():
            if cost.kind == "collective":
                part = "sequence" if cost.scope else "sharding"
                sent[f"{part}.{_COLLECTIVES[cost.name]}"] += cost.bytes * calls
        return dict(sent)


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Forward and backward by place, which is `<forward or backward> <block index, start or end>`.

    `start` lasts until the first block (in backward, the last) begins, and `forward end` from its output to the loss.

    Args:
        peaks: highest live bytes. starts: live bytes when the place is entered.
        costs: calls per op, the place as phase.
        kept: live bytes after forward. left: live bytes after backward.
    """

    peaks: Mapping[str, int]
    starts: Mapping[str, int]
    costs: Mapping[OpCost, int]
    kept: int
    left: int


def trace_step(
    config: DiTConfig,
    parallel: ParallelConfig,
    mesh: ParallelMesh,
    *,
    latent_size: tuple[int, int, int],
    batch: int,
    open_pointwise: bool = False,
) -> StepTrace:
    """Run a whole step, every block and the optimizer.

    Optimizer states exist before the step, as in every step but the first; gradients do not.

    Args:
        config: the model.
        parallel: how it is spread; its attention provider must name one.
        mesh: over a fake world.
        latent_size: (T, H, W) of one sample's latents.
        batch: samples of one SP group.
        open_pointwise: see OpLedger.
    """
    ledger = OpLedger(open_pointwise=open_pointwise)
    with ShapesOnly(), StorageTracker(ledger) as tracker:
        store = SizesOnly()
        parallel_model = ParallelDiT(DiT(config), mesh, parallel, store=store)
        optimizer = build_optimizer(parallel_model)
        allocate_state(optimizer)
        state = tracker.current
        # The training loop holds its batch until the step is over.
        data = fake_batch(parallel_model, latent_size, batch)
        places = run_places(parallel_model, tracker, ledger, data)
        optimizer_peak, optimizer_costs = run_optimizer(optimizer, tracker, ledger)
    return StepTrace(
        peaks=by_phase(places.peaks) | {"optimizer": optimizer_peak},
        state=state,
        kept=places.kept - state,
        costs=costs_by_phase(places.costs, optimizer_costs),
        group_sizes=group_sizes(mesh),
        group_extents=group_extents(mesh),
        host_bytes=store.peak_bytes,
    )


class SizesOnly(HostStore):
    """Host memory that holds sizes and no data: fake tensors of the host would count as the device's."""

    def _copy(self, entry: HostTensor, flat: Tensor, *, out: bool) -> None:
        pass

    def _slab(self, num_bytes: int) -> None:
        return None


def build_optimizer(parallel_model: ParallelDiT) -> torch.optim.Optimizer:
    """AdamW over one tensor list, PyTorch's default on CUDA; the CPU default would differ."""
    return torch.optim.AdamW(parallel_model.parameters(), lr=1e-4, foreach=True)


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """First and second moments, by a step on gradients of the shards' shapes."""
    allocate_gradients(optimizer)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def allocate_gradients(optimizer: torch.optim.Optimizer) -> None:
    """A gradient for every parameter (shard)."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)


def run_optimizer(
    optimizer: torch.optim.Optimizer, tracker: StorageTracker, ledger: OpLedger
) -> tuple[int, Mapping[OpCost, int]]:
    """Peak bytes and op calls of one optimizer step."""
    ledger.costs.clear()
    tracker.phase = ledger.phase = "optimizer"
    optimizer.step()
    return tracker.peaks["optimizer"], ledger.costs.copy()


def run_places(parallel_model: ParallelDiT, tracker: StorageTracker, ledger: OpLedger, batch: Batch) -> Places:
    """One forward and backward of a wrapped model, inside the tracker's context."""
    starts: dict[str, int] = {}

    def enter(place: str) -> None:
        starts[place] = tracker.current
        tracker.phase = ledger.phase = place

    tracker.peaks.clear()
    ledger.costs.clear()
    _call_at_places(parallel_model.module.blocks, enter)  # type: ignore[arg-type]
    enter("forward start")
    loss = parallel_model.loss(batch)
    kept = tracker.current
    enter("backward start")
    loss.backward()
    del loss
    return Places(peaks=dict(tracker.peaks), starts=starts, costs=ledger.costs.copy(), kept=kept, left=tracker.current)


def _call_at_places(blocks: nn.ModuleList, enter: Any) -> None:
    """Call enter(place) when a block runs forward, and when the gradient of its output has arrived."""
    for index, block in enumerate(blocks):

        def before(module: nn.Module, args: Any, index: int = index) -> None:
            enter(f"forward {index}")

        def after(module: nn.Module, args: Any, output: Tensor, index: int = index) -> None:
            if index == len(blocks) - 1:
                enter("forward end")
            output.register_hook(lambda grad: enter(f"backward {index}"))

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)


def fake_batch(parallel_model: ParallelDiT, latent_size: tuple[int, int, int], batch: int) -> Batch:
    """Inputs of one SP group: `batch` samples of latents (T, H, W), with the conditions that the model takes."""
    config = parallel_model.model_config
    shape = (batch, *latent_size, config.in_channels)
    return Batch(
        latents=torch.empty(shape),
        noise=torch.empty(shape),
        timestep=torch.empty(batch),
        text=torch.empty(batch, config.max_text_tokens, config.text_dim) if takes_text(config) else None,
        labels=torch.empty(batch, dtype=torch.int64) if config.num_classes else None,
        global_samples=batch * parallel_model.mesh.dp_degree,
    )


def by_phase(peaks: Mapping[str, int]) -> dict[str, int]:
    """Highest value over the places of `forward` and of `backward`."""
    highest: dict[str, int] = {}
    for place, peak in peaks.items():
        phase = place.split()[0]
        highest[phase] = max(highest.get(phase, 0), peak)
    return highest


def costs_by_phase(*costs: Mapping[OpCost, int]) -> Mapping[OpCost, int]:
    """All costs together, places replaced by `forward` and `backward`."""
    total: Counter[OpCost] = Counter()
    for part in costs:
        for cost, calls in part.items():
            total[replace(cost, phase=cost.phase.split()[0])] += calls
    return total


def group_sizes(mesh: ParallelMesh) -> dict[str, int]:
    """Ranks of the mesh's process groups, by name."""
    names = mesh.sp_group, mesh.flat.get_group().group_name, mesh.ulysses_group, mesh.ring_group
    return {name: comm.group_size(name) for name in names if name}


def group_extents(mesh: ParallelMesh) -> dict[str, int]:
    """Of the same groups, the consecutive ranks of the world between their first and their last."""
    sizes = group_sizes(mesh)
    # SP groups and those that split heads are consecutive ranks; a ring takes one of each of the latter.
    stride = sizes.get(mesh.ulysses_group, 1)
    return sizes | ({mesh.ring_group: (sizes[mesh.ring_group] - 1) * stride + 1} if mesh.ring_group else {})
