"""Prediction of one training step on GPUs that are not there: memory, FLOPs, traffic, time; labelled `predicted`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from longreel.models.config import DiTConfig
from longreel.parallel.config import ParallelConfig, Precision
from longreel.parallel.mesh import build_mesh
from longreel.parallel.predict.calibration import MeasuredRates
from longreel.parallel.predict.depth import OptimizerTrace, step_at_depth, trace_optimizer
from longreel.parallel.predict.fake_world import fake_world
from longreel.parallel.predict.flops import useful_flops
from longreel.parallel.predict.hardware import (
    FIXED_RESERVE_BYTES,
    FIXED_RESERVE_SOURCE,
    FRAGMENTATION_SHARE,
    FRAGMENTATION_SOURCE,
    GPUProfile,
    get_profile,
)
from longreel.parallel.predict.roofline import step_time
from longreel.parallel.predict.step import StepTrace

# Tokens of one latent frame where only a sequence length is given: 16 x 16 patches, 256x256 pixels through SD-VAE.
FRAME_SIDE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionCase:
    """One point to predict.

    Args:
        model: the DiT.
        parallel: strategy, sp_degree, engine, policy. Precision must be bf16, or that of `rates`; attention `auto` is
            predicted as `sdpa-flash`: there are no rates yet for the Triton kernels that `auto` picks on CUDA.
        num_gpus: GPUs of a node, or of whole nodes; dp_degree = num_gpus / sp_degree.
        target: name of a profile, or a TOML file of the user's own, see longreel.parallel.predict.hardware; or the
            device of `rates`, which then need no profile.
        seq_len: video tokens of one sample, or
        latent_size: (T, H, W) latents of one sample. Exactly one of the two.
        batch_per_group: samples that each SP group holds.
        fused_pointwise: take adaLN-modulate, gated residual and bias-GELU as one kernel each without temporaries;
            False follows their eager specification, fp32 temporaries included.
        rates: measured on a GPU (longreel.parallel.predict.calibration), in place of those assumed; then
            attention_provider may be any that they are of. None: all rates are assumed.
        computes_on: profile of the GPU that an emulated rank of the target runs on, whose compute and memory bandwidth
            count then; None: the target's.
    """

    model: DiTConfig
    parallel: ParallelConfig
    num_gpus: int
    target: str
    seq_len: int | None = None
    latent_size: tuple[int, int, int] | None = None
    batch_per_group: int = 1
    fused_pointwise: bool = True
    rates: MeasuredRates | None = None
    computes_on: str | None = None

    def __post_init__(self) -> None:
        if (self.seq_len is None) == (self.latent_size is None):
            raise ValueError(f"give seq_len or latent_size, one of them; got {self.seq_len} and {self.latent_size}")
        if self.seq_len is not None and self.seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, got {self.seq_len}")
        if self.batch_per_group < 1:
            raise ValueError(f"batch_per_group must be at least 1, got {self.batch_per_group}")
        own = self.rates is not None and self.target == self.rates.device
        self.profile.check_gpus(self.num_gpus)
        if self.parallel.engine == "colossalai":
            raise ValueError(
                "engine 'colossalai' cannot be predicted: it does not run on fake tensors; use fsdp2-zero2, which "
                "shards the same things"
            )
        if self.parallel.precision != ("bf16" if self.rates is None else self.rates.dtype):
            raise ValueError(
                f"precision {self.parallel.precision!r} cannot be predicted: there are rates for "
                f"{'bf16' if self.rates is None else self.rates.dtype} only"
                + ("; engine 'ddp' has no bf16, use fsdp2-zero2 or -zero3" if self.parallel.engine == "ddp" else "")
            )
        provider = self.parallel.attention_provider
        measured = () if self.rates is None else self.rates.providers(self.model.head_dim)
        known = measured if own else ("sdpa-flash", *measured)
        if provider not in (known if own else ("auto", *known)):
            raise ValueError(
                f"attention_provider {provider!r} cannot be predicted: there are rates for "
                f"{', '.join(dict.fromkeys(known)) or 'none'} only; use one of them, or calibrate "
                f"on op records that have forward and backward of it at head_dim {self.model.head_dim}"
            )
        if self.parallel.policy == "auto":
            raise ValueError("policy 'auto' cannot be predicted: it chooses by predictions; name a policy")
        self.parallel.dp_degree(self.num_gpus)
        self.parallel.check_heads(self.model.num_heads)

    @property
    def profile(self) -> GPUProfile:
        """Of the target, without the rates."""
        if self.rates is not None and self.target == self.rates.device:
            return self.rates.own_profile()
        return get_profile(self.target)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches (t, h, w): as the latents say, else 16 x 16 per frame where that divides, else one row."""
        if self.latent_size is not None:
            return self.model.grid(*self.latent_size)
        assert self.seq_len is not None
        return grid_of(self.seq_len)


def grid_of(seq_len: int) -> tuple[int, int, int]:
    """Patches (t, h, w) where only a length is given: 16 x 16 per frame where that divides, else one row."""
    frame = FRAME_SIDE**2
    return (seq_len // frame, FRAME_SIDE, FRAME_SIDE) if seq_len % frame == 0 else (1, 1, seq_len)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What is expected of one step. Nothing in it was measured.

    Args:
        kind: `predicted`.
        memory_bytes: peak of live bytes on the fullest rank. memory_by_phase: the same in forward, backward, optimizer.
        kept_bytes: live between forward and backward beyond parameters and optimizer state: activations, mostly.
        host_bytes: host memory that one rank takes for activations (policy `offload`), whole slabs.
        memory_limit: bytes of the GPU. usable_bytes: those left after the reserve (assumed).
        fits: memory_bytes is at most usable_bytes.
        flops: useful FLOPs of the step over all GPUs. hw_flops: with recomputation and padding.
        traffic: bytes one rank sends, `sequence.<collective>` and `sharding.<collective>`.
        step_s, interval_s: seconds and their (low, high); the times stand even where the step does not fit.
        mfu, hfu: flops and hw_flops over the GPUs' vendor peak for step_s.
        breakdown: seconds that add up to step_s, by part. hidden: communication seconds behind compute.
        inputs: every figure used, with provenance (vendor, assumed, measured) and source.
    """

    kind: str = "predicted"
    memory_bytes: int
    memory_by_phase: Mapping[str, int]
    kept_bytes: int
    host_bytes: int
    memory_limit: int
    usable_bytes: int
    fits: bool
    flops: float
    hw_flops: float
    traffic: Mapping[str, int]
    step_s: float
    interval_s: tuple[float, float]
    mfu: float
    hfu: float
    breakdown: Mapping[str, float]
    hidden: Mapping[str, float]
    inputs: Mapping[str, Any]


def predict_step(case: PredictionCase) -> Prediction:
    """Predict one training step (forward, backward, AdamW) on one rank of case.num_gpus, without any GPU.

    Args:
        case: the point. Points that differ in the target only share one fake run.

    Raises:
        ValueError: a process group is initialised in this process.
    """
    profile = case.profile
    if case.computes_on is not None:
        profile = get_profile(case.computes_on).standing_for(profile)
    if case.rates is not None:
        profile = case.rates.on(profile, case.parallel.attention_provider)
    parallel = replace(case.parallel, attention_provider="sdpa-flash")
    trace = trace_shape(case.model, parallel, case.num_gpus, case.grid, case.batch_per_group, case.fused_pointwise)
    time = step_time(
        trace.costs,
        profile,
        group_sizes=trace.group_sizes,
        group_extents=trace.group_extents,
        host_bytes=trace.host_bytes,
    )
    t, h, w = case.grid
    samples = case.batch_per_group * case.parallel.dp_degree(case.num_gpus)
    flops = float(samples * useful_flops(case.model, num_video=t * h * w))
    hw_flops = trace.flops * case.num_gpus
    peak_flops = profile.matmul_flops * case.num_gpus * time.seconds
    return Prediction(
        memory_bytes=trace.peak,
        memory_by_phase={phase: round(peak) for phase, peak in trace.peaks.items()},
        kept_bytes=round(trace.kept),
        host_bytes=trace.pinned_bytes,
        memory_limit=profile.memory_bytes,
        usable_bytes=profile.usable_bytes,
        fits=trace.peak <= profile.usable_bytes,
        flops=flops,
        hw_flops=hw_flops,
        traffic=trace.sent(),
        step_s=time.seconds,
        interval_s=(time.low, time.high),
        mfu=flops / peak_flops,
        hfu=hw_flops / peak_flops,
        breakdown=time.breakdown,
        hidden=time.hidden,
        inputs=_inputs(case, profile) | {name: asdict(rate) for name, rate in time.rates.items()},
    )


@lru_cache(maxsize=1024)
def trace_shape(
    model: DiTConfig, parallel: ParallelConfig, world_size: int, grid: tuple[int, int, int], batch: int, fused: bool
) -> StepTrace:
    """What a step of this shape does on the first rank of a world, without times.

    Args:
        model: the DiT.
        parallel: engine `fsdp2`, any precision but fp64, attention_provider `sdpa-flash` or `torch`.
        world_size: ranks. grid: patches (t, h, w) of a sample. batch: samples of an SP group.
        fused: see PredictionCase.fused_pointwise.

    Raises:
        ValueError: a process group is initialised in this process.
    """
    t, h, w = (n * p for n, p in zip(grid, model.patch_size, strict=True))
    optimizers = _shallow_optimizers(replace(model, depth=1), world_size, parallel.precision)
    with fake_world(world_size):
        mesh = build_mesh(sp_degree=parallel.sp_degree, ulysses_degree=parallel.ulysses_degree)
        return step_at_depth(
            model, parallel, mesh, optimizers, latent_size=(t, h, w), batch=batch, open_pointwise=not fused
        )


@lru_cache(maxsize=64)
def _shallow_optimizers(
    model: DiTConfig, world_size: int, precision: Precision
) -> tuple[OptimizerTrace, OptimizerTrace]:
    """At depths 1 and 2; neither the strategy nor ZeRO's stage changes what is sharded."""
    with fake_world(world_size):
        mesh = build_mesh(sp_degree=1)
        parallel = ParallelConfig(precision=precision)
        return trace_optimizer(model, parallel, mesh), trace_optimizer(replace(model, depth=2), parallel, mesh)


def _inputs(case: PredictionCase, profile: GPUProfile) -> dict[str, Any]:
    def vendor(value: float) -> dict[str, Any]:
        if case.rates is not None and case.target == case.rates.device:
            return {"value": value, "provenance": "measured", "source": f"the fastest product on {profile.name}"}
        source = f"{profile.name} data sheet" if profile.file is None else f"as {Path(profile.file).name} says"
        return {"value": value, "provenance": "vendor", "source": source}

    def assumed(value: Any, source: str) -> dict[str, Any]:
        return {"value": value, "provenance": "assumed", "source": source}

    pointwise = "one fused kernel each, no temporaries" if case.fused_pointwise else "their eager specification"
    return {
        "target": profile.label,
        "peak_flop_s": vendor(profile.matmul_flops),
        "memory_bytes": assumed(
            profile.memory_bytes, f"GB of {profile.name}'s data sheet taken as GiB, which the driver shows within 1 %"
        ),
        "fixed_reserve_bytes": assumed(FIXED_RESERVE_BYTES, FIXED_RESERVE_SOURCE),
        "fragmentation_share": assumed(FRAGMENTATION_SHARE, FRAGMENTATION_SOURCE),
        "attention": assumed(
            "sdpa-flash" if case.parallel.attention_provider == "auto" else case.parallel.attention_provider,
            "memory as of FlashAttention-2 as PyTorch runs it, its dQ accumulator included",
        ),
        "pointwise": assumed(pointwise, "adaLN modulate, gated residual and bias-GELU"),
        "optimizer": assumed("AdamW foreach", "PyTorch's default on CUDA, fp32 states sharded as the parameters"),
    }
