"""What a run needs under one configuration: memory of a rank and, where the GPU's rates are known, time.

The one place where a choice (policy `auto`, the planner) meets the predictor. `least_bytes` says what a configuration
needs at least without running it, so that hopeless ones cost a choice nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from longreel.models.config import DiTConfig
from longreel.parallel.config import DTYPES, HALF_PRECISIONS, ParallelConfig, Policy
from longreel.parallel.predict.hardware import GPUProfile
from longreel.parallel.predict.predict import trace_shape
from longreel.parallel.predict.roofline import step_time

# Hidden states [s, C] of a rank that a block keeps between forward and backward at least: with self-attention and
# without, by policy; a tiled MLP keeps 8 fewer. Then what is live at least beside them in the backward of one block,
# plain and tiled. tests/parallel/predict/test_needs.py holds them below real predictions.
_KEPT: dict[Policy, tuple[int, int]] = {"none": (18, 16), "keep_attention": (2, 1), "full": (1, 1), "offload": (0, 0)}
_KEPT_BY_MLP = 8
_BESIDE, _BESIDE_TILED = 15, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What a step needs of one rank.

    Args:
        parallel: the configuration, its attention provider as given.
        samples: of one step over all ranks.
        device_bytes: peak of live tensors. host_bytes: host memory for activations, whole slabs.
        seconds, low, high: predicted time of a step and its interval, None where the rates are not known.
        fits: both within their limits.
    """

    parallel: ParallelConfig
    samples: int
    device_bytes: int
    host_bytes: int
    seconds: float | None
    low: float | None
    high: float | None
    fits: bool

    @property
    def policy(self) -> Policy:
        """Of the configuration."""
        return self.parallel.policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is given where a configuration is chosen.

    Args:
        model: the DiT. world_size: ranks. grid: patches (t, h, w) of a sample.
        samples: of one step over all ranks, which fill its groups as evenly as they go; None: one per group.
        limit_bytes: memory that the tensors of one rank may take. host_limit_bytes: the same in host memory.
        attention_provider: `sdpa-flash` for any kernel that keeps no scores, `torch` for the eager specification.
        fused_pointwise: see longreel.parallel.predict.predict.PredictionCase.
        gpu: profile with the rates of the GPUs, None if they are not known.
    """

    model: DiTConfig
    world_size: int
    grid: tuple[int, int, int]
    samples: int | None = None
    limit_bytes: int
    host_limit_bytes: int
    attention_provider: str = "sdpa-flash"
    fused_pointwise: bool = True
    gpu: GPUProfile | None = None

    @property
    def tokens(self) -> int:
        """Video tokens of a sample."""
        return math.prod(self.grid)

    def samples_of(self, parallel: ParallelConfig) -> int:
        """Samples of one step."""
        return self.samples or parallel.dp_degree(self.world_size)

    def is_timed(self, parallel: ParallelConfig) -> bool:
        """Whether there are rates: those known are of bf16."""
        return self.gpu is not None and parallel.precision == "bf16"

    def need(self, parallel: ParallelConfig) -> Need:
        """What a step needs under this configuration.

        Args:
            parallel: engine `fsdp2-...`, any precision but fp64, a policy that is named.

        Raises:
            ValueError: a process group is initialised in this process.
        """
        traced = replace(parallel, attention_provider=self.attention_provider)
        batch = -(-self.samples_of(parallel) // parallel.dp_degree(self.world_size))
        trace = trace_shape(self.model, traced, self.world_size, self.grid, batch, self.fused_pointwise)
        seconds = low = high = None
        if self.gpu is not None and self.is_timed(parallel):
            time = step_time(
                trace.costs,
                self.gpu,
                group_sizes=trace.group_sizes,
                group_extents=trace.group_extents,
                host_bytes=trace.host_bytes,
            )
            seconds, low, high = time.seconds, time.low, time.high
        return Need(
            parallel=parallel,
            samples=self.samples_of(parallel),
            device_bytes=trace.peak,
            host_bytes=trace.pinned_bytes,
            seconds=seconds,
            low=low,
            high=high,
            fits=trace.peak <= self.limit_bytes and trace.pinned_bytes <= self.host_limit_bytes,
        )

    def least_bytes(self, parallel: ParallelConfig) -> int:
        """Memory of a rank that the configuration needs at least, without a run."""
        model = self.model
        batch = -(-self.samples_of(parallel) // parallel.dp_degree(self.world_size))
        element = DTYPES["bf16" if parallel.precision in HALF_PRECISIONS else parallel.precision].itemsize
        hidden = batch * (self.tokens // parallel.sp_degree) * model.hidden_size * element
        kept, beside = _KEPT[parallel.policy][model.text_only], _BESIDE
        if parallel.mlp_tile is not None:
            kept, beside = kept - (_KEPT_BY_MLP if parallel.policy == "none" else 0), _BESIDE_TILED
        return hidden * (model.depth * kept + (0 if parallel.policy == "none" else beside))
