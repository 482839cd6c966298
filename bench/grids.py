"""Grids of points: axes in, points out, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from longreel.bench.cases import DeviceType, Point, Timing
from longreel.bench.peers import PEERS
from longreel.models.config import PRESETS, Conditioning, CrossLayout, DiTConfig, preset
from longreel.parallel.config import Engine, ParallelConfig, Policy, Precision, Strategy
from longreel.parallel.predict.hardware import get_profile
from longreel.reports.records import Kind, Regime

# Text tokens of one sample, and the width of T5's features, in models of true size.
NUM_TEXT_TOKENS, TEXT_DIM = 20, 4096
# The one baseline of every ratio: ZeRO-2, SP 1, SDPA flash attention, full recomputation.
BASELINE: dict[str, Any] = {
    "strategy": "local",
    "sp_degree": 1,
    "engine": "fsdp2-zero2",
    "policy": "full",
    "attention_provider": "sdpa-flash",
}
# From the fastest to the one that needs least memory.
DEFAULT_POLICIES: tuple[Policy, ...] = ("none", "keep_attention", "full")
# Blocks and tokens of the gate's step where a whole step in fp32 on one GPU would take minutes. Two blocks hold all
# that differs between blocks; the tokens are enough for every rank of eight to overlap by chunks (4,096 on each).
GPU_GATE_DEPTH, GPU_GATE_LEN = 2, 32_768


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """What every grid may vary.

    Args:
        seq_lens: lengths in video tokens.
        strategies: `local` is data parallelism alone.
        sp_degrees: of the strategies that split the sequence, where they divide the ranks.
        policies: activation policies. engines: sharding engines. attentions: attention providers.
        head_chunks: of `ulysses` and `usp`; None: chosen by length. mlp_tiles: see ParallelConfig.mlp_tile.
        batches: samples of one SP group.
        peers: implementations of other projects, see longreel.bench.peers.
        baseline: the baseline is there whatever the axes say.
        point_timeout_s: limit of one point.
    """

    seq_lens: tuple[int, ...]
    strategies: tuple[Strategy, ...] = ("local", "ulysses", "fastseq")
    sp_degrees: tuple[int, ...] = (2, 4)
    policies: tuple[Policy, ...] = ("none",)
    engines: tuple[Engine, ...] = ("fsdp2-zero2",)
    attentions: tuple[str, ...] = ("sdpa-flash",)
    head_chunks: tuple[int | None, ...] = (None,)
    mlp_tiles: tuple[int | None, ...] = (None,)
    batches: tuple[int, ...] = (1,)
    peers: tuple[str, ...] = ()
    baseline: bool = True
    point_timeout_s: float = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredGrid(Axes):
    """Measured points: a DiT on real processes, each with a CPU core or a GPU.

    Args:
        ranks: world sizes.
        model: the DiT. name: of it; None: its sizes in words.
        precision: see ParallelConfig. device_type: of the ranks.
        timing: how steps are sampled. longest_timing: the same at the longest of several lengths on a CPU.
        refused: why none of it can run on this machine; its points become rows that say so.
        max_len_mixed: longest length at which SP and DP are mixed on one world (SP 2 x DP 2 on 4 ranks).
    """

    ranks: tuple[int, ...] = (1, 2, 4)
    model: DiTConfig
    name: str | None = None
    precision: Precision = "fp32"
    device_type: DeviceType = "cpu"
    timing: Timing = field(default_factory=Timing)
    longest_timing: Timing = field(default_factory=lambda: Timing(min_samples=2, max_samples=2))
    refused: str | None = None
    max_len_mixed: int = 2**62

    @property
    def model_name(self) -> str:
        m = self.model
        words = self.name or f"DiT of depth {m.depth}, width {m.hidden_size}, {m.num_heads} heads"
        return f"{words} in the published layout" if m.cross_layout == "published" and self.name is None else words


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetGrid(Axes):
    """Points of one regime and layout: a real DiT on the GPUs of one node, predicted or emulated.

    Args:
        kind: `predicted` or `emulated`.
        regime: `full` or `text_only`.
        conditioning: how text conditions the model. layout: of the cross attention; None: `published` under `text_only`
            (the layout of the code behind the published table), else `replicated`.
        model_preset: name of a DiT preset. target: GPU profile, as get_profile takes it. num_gpus: GPUs of one node.
        every_policy: run each policy everywhere; otherwise, of a strategy and degree, the first one that fits into
            memory, and each no further than the first length at which it does not. The baseline is everywhere.
        search: for every configuration also the longest length that fits.
        whole_depth: emulated points run the model's depth once, whatever it takes.
    """

    kind: Kind = "predicted"
    regime: Regime
    conditioning: Conditioning = "cross"
    layout: CrossLayout | None = None
    model_preset: str = "dit-xl-2"
    target: str = "H800"
    num_gpus: int = 8
    sp_degrees: tuple[int, ...] = (2, 4, 8)
    policies: tuple[Policy, ...] = DEFAULT_POLICIES
    every_policy: bool = False
    search: bool = False
    whole_depth: bool = False
    # One step of the baseline at 819,200 tokens takes 26 minutes; untimed steps and two samples are four of them.
    point_timeout_s: float = 7_200.0

    @property
    def cross_layout(self) -> CrossLayout:
        return self.layout or ("published" if self.regime == "text_only" else "replicated")

    @property
    def dit(self) -> DiTConfig:
        return preset(
            self.model_preset,
            conditioning=self.conditioning,
            max_text_tokens=NUM_TEXT_TOKENS,
            text_dim=TEXT_DIM,
            text_only=self.regime == "text_only",
            cross_layout=self.cross_layout,
        )

    @property
    def model_name(self) -> str:
        name = self.model_preset.replace("dit-", "DiT-")
        for size in ("s", "b", "l", "xl"):
            name = name.replace(f"-{size}-", f"-{size.upper()}/")
        if self.conditioning != "cross":
            name += f", {self.conditioning} conditioning"
        return f"{name} in the published layout" if self.cross_layout == "published" else name


def preset_of(model: DiTConfig) -> str | None:
    """Name of the preset that a model of true size was made from, None for other models."""
    sizes = ("depth", "hidden_size", "num_heads", "patch_size")
    if model.text_dim != TEXT_DIM:
        return None
    same = (name for name in PRESETS if all(getattr(preset(name), size) == getattr(model, size) for size in sizes))
    return next(same, None)


def ulysses_degree_of(sp_degree: int, num_heads: int) -> int | None:
    """U of USP: the largest degree that leaves a ring and divides the heads, None where there is none."""
    degrees = [u for u in range(2, sp_degree) if sp_degree % u == 0 and num_heads % u == 0]
    return max(degrees, default=None)


def _spreads(grid: Axes, num_devices: int, num_heads: int) -> Iterator[dict[str, Any]]:
    """Strategy and degrees of each ParallelConfig that num_devices ranks can be split into."""
    if "local" in grid.strategies:
        yield {"strategy": "local", "sp_degree": 1}
    for degree in grid.sp_degrees:
        for strategy in grid.strategies:
            if strategy == "local" or num_devices % degree:
                continue
            if strategy != "usp":
                yield {"strategy": strategy, "sp_degree": degree}
            elif ulysses_degree := ulysses_degree_of(degree, num_heads):
                yield {"strategy": strategy, "sp_degree": degree, "ulysses_degree": ulysses_degree}


def configurations(
    grid: Axes, num_devices: int, num_heads: int, *, policies: tuple[Policy, ...], precision: Precision
) -> list[dict[str, Any]]:
    """The baseline first, then parallel configuration, peer and batch of every combination of the axes.

    Args:
        grid: the axes. num_devices: ranks to split. num_heads: of the model. policies: those of the grid, or one.
        precision: of all of them.

    Raises:
        ValueError: an engine does not take the precision.
    """
    found: list[dict[str, Any]] = []
    if grid.baseline:
        found.append({"parallel": ParallelConfig(**BASELINE, precision=precision), "batch_per_group": grid.batches[0]})
    for policy in policies:
        for spread in _spreads(grid, num_devices, num_heads):
            chunked = spread["strategy"] in ("ulysses", "usp")
            for engine in grid.engines:
                for attention in grid.attentions:
                    for chunks in grid.head_chunks if chunked else (None,):
                        for tile in grid.mlp_tiles:
                            parallel = ParallelConfig(
                                **spread,
                                engine=engine,
                                policy=policy,
                                attention_provider=attention,
                                head_chunks=chunks,
                                mlp_tile=tile,
                                precision=precision,
                            )
                            found += [{"parallel": parallel, "batch_per_group": batch} for batch in grid.batches]
        for name in grid.peers:
            for degree in grid.sp_degrees:
                if num_devices % degree == 0 and policy in PEERS[name].policies:
                    stood_for = PEERS[name].parallel(degree, num_heads, policy, precision)
                    if stood_for is not None:
                        found.append({"parallel": stood_for, "peer": name, "batch_per_group": grid.batches[0]})
    # The baseline may be among the combinations too.
    return [one for i, one in enumerate(found) if one not in found[:i]]


def is_baseline(one: dict[str, Any]) -> bool:
    """Whether a configuration is the baseline's, whatever its batch."""
    parallel = one["parallel"]
    return "peer" not in one and parallel == ParallelConfig(**BASELINE, precision=parallel.precision)


def marked(grid: Axes, point: Point) -> Point:
    """A point of the grid whose policy was settled, marked where that made it the baseline."""
    one = {"parallel": point.parallel} | ({} if point.peer is None else {"peer": point.peer})
    return replace(point, is_baseline=is_baseline(one) and point.batch_per_group == grid.batches[0])


def measured_points(grid: MeasuredGrid, *, device: str) -> list[Point]:
    """The grid's points by length, then by number of ranks: a baseline and its candidates are next to each other."""
    points = []
    on_gpu = grid.device_type == "cuda"
    for seq_len in grid.seq_lens:
        longest = not on_gpu and seq_len == max(grid.seq_lens) and len(grid.seq_lens) > 1
        for ranks in grid.ranks:
            for one in configurations(
                grid, ranks, grid.model.num_heads, policies=grid.policies, precision=grid.precision
            ):
                if 1 < one["parallel"].sp_degree < ranks and seq_len > grid.max_len_mixed:
                    continue
                points.append(
                    Point(
                        **one,
                        kind="measured",
                        model=grid.model,
                        model_name=grid.model_name,
                        num_devices=ranks,
                        device=device,
                        device_type=grid.device_type,
                        seq_len=seq_len,
                        is_baseline=is_baseline(one) and one["batch_per_group"] == grid.batches[0],
                        timing=grid.longest_timing if longest else grid.timing,
                        refused=grid.refused,
                        gate_depth=min(GPU_GATE_DEPTH, grid.model.depth) if on_gpu else None,
                        gate_len=min(GPU_GATE_LEN, seq_len) if on_gpu else None,
                    )
                )
    return points


def target_points(grid: TargetGrid) -> list[list[Point]]:
    """The grid's points in groups of one length and one policy; a group's points do not depend on each other."""
    groups: list[list[Point]] = []
    device = get_profile(grid.target).label
    order = dict.fromkeys((*grid.policies, BASELINE["policy"]) if grid.baseline else grid.policies)
    for seq_len in grid.seq_lens:
        for policy in order:
            asked = (policy,) if policy in grid.policies else ()
            found = [
                one
                for one in configurations(grid, grid.num_gpus, grid.dit.num_heads, policies=asked, precision="bf16")
                if one["parallel"].policy == policy
            ]
            groups.append(
                [
                    Point(
                        **one,
                        kind=grid.kind,
                        model=grid.dit,
                        model_name=grid.model_name,
                        num_devices=grid.num_gpus,
                        device=device,
                        seq_len=seq_len,
                        is_baseline=is_baseline(one) and one["batch_per_group"] == grid.batches[0],
                        target=grid.target,
                    )
                    for one in found
                ]
            )
    return [group for group in groups if group]
