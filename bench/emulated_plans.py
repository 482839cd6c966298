"""How an emulated point is run, and how long that takes: decided before anything has run.

A step is estimated from the work of its blocks at a target's assumed rates; once points have been timed on a device,
what is left is scaled by how far off the estimate was.
"""

from __future__ import annotations

from dataclasses import replace

from longreel.bench.cases import Point
from longreel.bench.emulated_result import Plan, continued
from longreel.parallel.predict.hardware import FIXED_RESERVE_BYTES, GPUProfile, get_profile
from longreel.parallel.predict.predict import PredictionCase, predict_step

# A step of the model's depth that takes less is timed as it is, and depths 1 and 2 beside it show how well they
# continue; above it they have to do.
WHOLE_S = 4.0
# Timed steps: of short ones, and the fewest, which long ones get.
SAMPLES, LEAST_SAMPLES = 3, 2
# Where the line of memory is further off than this by prediction, the model's depth is run once for it.
_LINE = 0.02
# An untimed step of full length at each depth, up to this long.
_WARM_UP_S = 6.0
# Assumed, seconds: starting a worker with its CUDA context and compiling kernels, once; weights, data and the short
# step of a depth; counting what a step does.
START_S, DEPTH_S, POINT_S = 20.0, 1.5, 2.0


def block_seconds(point: Point, profile: GPUProfile | None = None) -> float:
    """Seconds of one block, forward and backward, on one rank, communication left out.

    Args:
        point: its model, policy and length. profile: whose rates; None: the point's target.
    """
    if profile is None:
        assert point.target is not None
        profile = get_profile(point.target)
    model, parallel = point.model, point.parallel
    tokens = point.seq_len * point.batch_per_group / parallel.sp_degree
    recomputed = parallel.policy != "none"
    # Query, key, value and output of self-attention, query and output of the text's, the MLP of 4 C.
    projections = (0 if model.text_only else 8) + (4 if model.conditioning == "cross" else 0) + 16
    linear = tokens * projections * model.hidden_size**2 * (4 if recomputed else 3) / profile.matmul.value
    if model.text_only:
        return linear
    scores = 4.0 * tokens * point.seq_len * model.hidden_size
    forwards = 2 if parallel.policy == "full" else 1
    forward, backward = (profile.attention(model.head_dim, backward=b).value for b in (False, True))
    return linear + scores * (forwards / forward + 2.5 / backward)


def plan_of(point: Point, block_s: float, *, whole_depth: bool = False) -> Plan:
    """Depths and samples of a point.

    Args:
        point: what is run. block_s: seconds of one block.
        whole_depth: run the model's depth once in any case, for its memory.
    """
    depth = point.model.depth
    if depth <= 2:
        return Plan(depths=(depth,), samples=SAMPLES)
    if depth * block_s <= WHOLE_S:
        return Plan(depths=(1, 2, depth), samples=SAMPLES, whole_samples=SAMPLES)
    plan = Plan(
        depths=(1, 2), samples=LEAST_SAMPLES, warm_up=2 * block_s <= _WARM_UP_S, memory_share=memory_share(point)
    )
    # One that is not expected to fit is not run whole, however its memory continues.
    is_off = plan.memory_share <= 1 and abs(memory_line(point) - 1) > _LINE
    return replace(plan, depths=(1, 2, depth)) if whole_depth or is_off else plan


def plan_seconds(plan: Plan, block_s: float) -> float:
    """Seconds that a plan takes; one that is not expected to fit ends after one sample of depths 1 and 2.

    Args:
        plan: of the point. block_s: seconds of one block.
    """
    if plan.memory_share > 1:
        return POINT_S + 2 * DEPTH_S + 3 * block_s * (2 if plan.warm_up else 1)
    samples = [plan.samples, plan.samples, plan.whole_samples]
    steps = sum(depth * (n + plan.warms_up(depth)) for depth, n in zip(plan.depths, samples, strict=False))
    builds = len(plan.depths) + plan.is_doubtful
    return POINT_S + DEPTH_S * builds + block_s * steps


def memory_share(point: Point) -> float:
    """Predicted peak of a step over what the target leaves the allocator."""
    assert point.target is not None
    return _peak(point, point.model.depth) / (get_profile(point.target).memory_bytes - FIXED_RESERVE_BYTES)


def memory_line(point: Point) -> float:
    """Predicted peak continued from depths 1 and 2, over that of the model's depth: 1 where memory is on the line.

    At short lengths a step of one block peaks elsewhere than one of many.
    """
    depth = point.model.depth
    return continued(_peak(point, 1), _peak(point, 2), depth) / _peak(point, depth)


def _peak(point: Point, depth: int) -> int:
    assert point.target is not None
    case = PredictionCase(
        model=replace(point.model, depth=depth),
        parallel=replace(point.parallel, attention_provider="sdpa-flash"),
        num_gpus=point.num_devices,
        target=point.target,
        seq_len=point.seq_len,
        batch_per_group=point.batch_per_group,
    )
    return predict_step(case).memory_bytes


class Estimates:
    """Seconds of points, corrected by those that have run."""

    def __init__(self) -> None:
        self._factor: dict[str, tuple[int, float]] = {}

    def block_s(self, point: Point) -> float:
        """Seconds of one block: the estimate, times how far off it was at the longest length of its attention."""
        _, factor = self._factor.get(point.parallel.attention_provider, (0, 1.0))
        return block_seconds(point) * factor

    def saw(self, point: Point, block_s: float) -> None:
        """A block of a point took block_s."""
        provider = point.parallel.attention_provider
        if point.seq_len >= self._factor.get(provider, (0, 1.0))[0] and not point.model.text_only:
            self._factor[provider] = point.seq_len, block_s / block_seconds(point)
