"""The step of a deep model from a run of three or four blocks, so that a prediction costs a fraction of a second.

Blocks repeat, so op calls and bytes are linear in depth; a block away from both ends is the one that repeats. What it
keeps between forward and backward, and the shard of its gradient, move the peaks:
- at the start of the stack, by the extra blocks' parameters and optimizer state, in backward also by their gradients;
- at its end, by their parameters, optimizer state and kept activations.
In between, live bytes are linear in the block's index, so no peak hides there. Only the first and last two blocks
differ from the rest (parameters prefetched, gradients still on their way). Tests hold this to full-depth runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.parallelize import ParallelDiT
from longreel.parallel.predict.ledger import OpCost, OpLedger
from longreel.parallel.predict.lifetimes import StorageTracker
from longreel.parallel.predict.shapes import ShapesOnly
from longreel.parallel.predict.step import (
    SizesOnly,
    StepTrace,
    allocate_gradients,
    allocate_state,
    build_optimizer,
    by_phase,
    costs_by_phase,
    fake_batch,
    group_extents,
    group_sizes,
    run_optimizer,
    run_places,
    trace_step,
)

# Blocks that are run: one at each end and those that repeat, two under ZeRO-3, as in backward the block above gathers
# the parameters of the block below.
SHALLOW = {"fsdp2-zero2": 3, "fsdp2-zero3": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerTrace:
    """Bytes and ops of parameters, optimizer state and optimizer step on one rank; nothing depends on the sequence.

    Args:
        parameters, state, gradients: bytes of the parameters, of those with both moments, and of the gradients.
        peak: highest live bytes of the optimizer step.
        costs: its op calls.
    """

    parameters: int
    state: int
    gradients: int
    peak: int
    costs: Mapping[OpCost, int]


def trace_optimizer(config: DiTConfig, parallel: ParallelConfig, mesh: ParallelMesh) -> OptimizerTrace:
    """Run one optimizer step on fake tensors, at the depth given."""
    ledger = OpLedger()
    with ShapesOnly(), StorageTracker(ledger) as tracker:
        parallel_model = ParallelDiT(DiT(config), mesh, parallel)
        parameters = tracker.current
        optimizer = build_optimizer(parallel_model)
        allocate_state(optimizer)
        state = tracker.current
        allocate_gradients(optimizer)
        gradients = tracker.current - state
        peak, costs = run_optimizer(optimizer, tracker, ledger)
    return OptimizerTrace(parameters=parameters, state=state, gradients=gradients, peak=peak, costs=costs)


def optimizer_at_depth(one: OptimizerTrace, two: OptimizerTrace, depth: int) -> OptimizerTrace:
    """The optimizer of a model of any depth, from depths 1 and 2.

    The optimizer's few ops run over lists of all parameters: continuing their call counts (some below zero) continues
    their bytes.
    """

    def line(a: int, b: int) -> int:
        return a + (b - a) * (depth - 1)

    return OptimizerTrace(
        parameters=line(one.parameters, two.parameters),
        state=line(one.state, two.state),
        gradients=line(one.gradients, two.gradients),
        peak=line(one.peak, two.peak),
        costs={cost: line(one.costs.get(cost, 0), two.costs.get(cost, 0)) for cost in {**one.costs, **two.costs}},
    )


def step_at_depth(
    config: DiTConfig,
    parallel: ParallelConfig,
    mesh: ParallelMesh,
    shallow_optimizers: tuple[OptimizerTrace, OptimizerTrace],
    *,
    latent_size: tuple[int, int, int],
    batch: int,
    open_pointwise: bool = False,
) -> StepTrace:
    """As trace_step, running a few blocks.

    Args:
        shallow_optimizers: of this model at depths 1 and 2, over as many ranks.
    """
    blocks = SHALLOW[parallel.engine]
    if config.depth <= blocks:
        return trace_step(config, parallel, mesh, latent_size=latent_size, batch=batch, open_pointwise=open_pointwise)
    ledger = OpLedger(open_pointwise=open_pointwise)
    with ShapesOnly(), StorageTracker(ledger) as tracker:
        store = SizesOnly()
        parallel_model = ParallelDiT(DiT(replace(config, depth=blocks)), mesh, parallel, store=store)
        data = fake_batch(parallel_model, latent_size, batch)
        run = run_places(parallel_model, tracker, ledger, data)

    shallow = optimizer_at_depth(*shallow_optimizers, blocks)
    whole = optimizer_at_depth(*shallow_optimizers, config.depth)
    extra = config.depth - blocks
    kept = extra * (run.starts["forward 2"] - run.starts["forward 1"])
    # The run has no moments and fewer parameters.
    state = whole.state - shallow.parameters
    gradients = whole.gradients - shallow.gradients
    before = {"forward": state, "backward": state + gradients}
    peaks = {}
    for place, peak in run.peaks.items():
        phase, where = place.split()
        # `backward start` is at the end of the stack; of three blocks, the middle one is near both ends.
        at_start = where in ("0", "1") or place == "forward start"
        at_end = where in (str(blocks - 2), str(blocks - 1)) or not at_start
        peaks[place] = peak + max(before[phase] if at_start else 0, state + kept if at_end else 0)

    middle = ("forward 1", f"backward {blocks - 2}")
    repeated = {cost: extra * calls for cost, calls in run.costs.items() if cost.phase in middle}
    # What backward leaves besides gradients: the batch.
    left = run.left - shallow.parameters - shallow.gradients
    return StepTrace(
        peaks=by_phase(peaks) | {"optimizer": whole.peak + left},
        state=whole.state,
        kept=run.kept - shallow.parameters + kept,
        costs=costs_by_phase(Counter(run.costs), repeated, whole.costs),
        group_sizes=group_sizes(mesh),
        group_extents=group_extents(mesh),
        # Every block keeps the same.
        host_bytes=store.peak_bytes * config.depth // blocks,
    )
