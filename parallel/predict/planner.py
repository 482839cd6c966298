"""The planner: the fastest configuration that fits, out of every strategy, degree, policy, MLP tile and ZeRO stage.

A spread is a strategy with its degrees. Of each spread the search runs no more configurations (on shapes, without data)
than it must: one that needs more memory at least than there is is not run, nor one that cannot be faster than one that
fits, by these facts of the time model: ZeRO-3 gathers what ZeRO-2 does and more; a tiled MLP and policy `full` compute
what the plain step does and more; `offload` does what `keep_attention` does and moves it; no op is faster than its
rate. tests/parallel/predict/test_planner.py holds the result equal to running everything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from longreel.parallel.config import Engine, ParallelConfig, Strategy
from longreel.parallel.predict.needs import Need, Setting
from longreel.parallel.predict.policy import ORDER, check_foreseeable, under_policy

# Tokens of a tile of the MLP, where it is tiled.
MLP_TILE = 4096
_TILES = (None, MLP_TILE)
_ENGINES: tuple[Engine, ...] = ("fsdp2-zero2", "fsdp2-zero3")
_DEGREE_STRATEGIES: tuple[Strategy, ...] = ("ulysses", "fastseq", "ring")
# A policy is no faster than another one of the same spread.
_NO_FASTER = {("full", "none"), ("offload", "keep_attention")}

# As builtins.map: what runs the search of spreads.
Mapper = Callable[[Callable[[ParallelConfig], "SpreadPlan"], Iterable[ParallelConfig]], Iterable["SpreadPlan"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A configuration that does not fit.

    Args:
        parallel: it. device_bytes: what it needs; exact: as predicted, otherwise at least. host_bytes: in host memory.
    """

    parallel: ParallelConfig
    device_bytes: int
    exact: bool
    host_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SpreadPlan:
    """What the search found for one strategy and its degrees.

    Args:
        spread: any configuration of it. best: the fastest that fits, None if none does.
        refused: what does not fit and could have been faster. runs: configurations that were run.
    """

    spread: ParallelConfig
    best: Need | None
    refused: tuple[Refused, ...]
    runs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The planner's answer. Nothing in it was measured.

    Args:
        setting: what was asked. best: the configuration to take. runners_up: the best of the other spreads, the fastest
            first (without rates: in the order of least recomputed and moved).
        refused: what does not fit and could have been faster, by spread. impossible: spreads that cannot run, and why.
        runs: configurations that were run on shapes.
    """

    setting: Setting
    best: Need
    runners_up: tuple[Need, ...]
    refused: tuple[Refused, ...]
    impossible: tuple[tuple[str, str], ...]
    runs: int

    def tokens_per_s(self, need: Need) -> tuple[float, float, float] | None:
        """Expected, least and most tokens per second over all ranks; None without rates."""
        if need.seconds is None or need.low is None or need.high is None:
            return None
        tokens = self.setting.tokens * need.samples
        return tokens / need.seconds, tokens / need.high, tokens / need.low


def spreads(num_ranks: int, base: ParallelConfig) -> Iterator[ParallelConfig]:
    """Every strategy and degree on so many ranks, possible or not for a model; the rest as base says.

    Args:
        num_ranks: of the run. base: precision, attention provider and what holds across strategies.
    """
    shared: dict[str, Any] = {
        "precision": base.precision,
        "attention_provider": base.attention_provider,
        "sp_across_nodes": base.sp_across_nodes,
    }
    yield ParallelConfig(**shared)
    degrees = [degree for degree in range(2, num_ranks + 1) if num_ranks % degree == 0]
    for degree, strategy in itertools.product(degrees, _DEGREE_STRATEGIES):
        yield ParallelConfig(strategy=strategy, sp_degree=degree, **shared)
    for degree in degrees:
        for ulysses in range(2, degree):
            if degree % ulysses == 0:
                yield ParallelConfig(strategy="usp", sp_degree=degree, ulysses_degree=ulysses, **shared)


def candidates(spread: ParallelConfig) -> list[ParallelConfig]:
    """Every policy, tile and ZeRO stage of a spread; of equally fast ones the first is taken."""
    return [
        replace(under_policy(spread, policy), mlp_tile=tile, engine=engine)
        for policy in ORDER
        for tile in _TILES
        for engine in _ENGINES
    ]


def impossible(setting: Setting, spread: ParallelConfig) -> str | None:
    """Why a spread cannot run in this setting, None if it can."""
    try:
        spread.check_heads(setting.model.num_heads)
    except ValueError as error:
        return str(error)
    if setting.samples is not None and setting.samples < spread.dp_degree(setting.world_size):
        return f"{setting.samples} samples are fewer than its {spread.dp_degree(setting.world_size)} groups"
    if spread.sp_degree > setting.tokens:
        return f"its {spread.sp_degree} ranks are more than the {setting.tokens} tokens"
    return None


def search_spread(setting: Setting, spread: ParallelConfig) -> SpreadPlan:
    """The fastest configuration of a spread that fits; without rates the first that does."""
    left = dict(enumerate(candidates(spread)))
    timed = setting.is_timed(spread)
    done: list[Need] = []
    refused: list[Refused] = []
    best: tuple[float, int, Need] | None = None

    def bound(place: int) -> tuple[float, int]:
        """Seconds that the candidate takes at least, and its place."""
        if not timed:
            return 0.0, place
        known = [need.seconds or 0.0 for need in done if _no_faster(left[place], need.parallel)]
        return max(known, default=least_seconds(setting, left[place])), place

    while left:
        seconds, place = min(map(bound, left))
        if best is not None and (seconds, place) > best[:2]:
            break
        parallel = left.pop(place)
        least = setting.least_bytes(parallel)
        if least > setting.limit_bytes:
            refused.append(Refused(parallel=parallel, device_bytes=least, exact=False))
            continue
        need = setting.need(parallel)
        done.append(need)
        if not need.fits:
            refused.append(
                Refused(parallel=parallel, device_bytes=need.device_bytes, exact=True, host_bytes=need.host_bytes)
            )
        elif best is None or (need.seconds or 0.0, place) < best[:2]:
            best = need.seconds or 0.0, place, need
    return SpreadPlan(spread=spread, best=best[2] if best else None, refused=tuple(refused), runs=len(done))


def _no_faster(one: ParallelConfig, other: ParallelConfig) -> bool:
    """Whether `one` takes at least as long as `other`, of the same spread."""
    return (
        (one.policy == other.policy or (one.policy, other.policy) in _NO_FASTER)
        and other.mlp_tile in (None, one.mlp_tile)
        and other.engine in ("fsdp2-zero2", one.engine)
    )


def least_seconds(setting: Setting, parallel: ParallelConfig) -> float:
    """Time of a step at least: the blocks' linear layers and self-attention at their rates, and nothing else."""
    model, gpu = setting.model, setting.gpu
    assert gpu is not None
    per_rank = setting.samples_of(parallel) * model.depth / setting.world_size
    recomputed = parallel.policy != "none"
    # Forward, twice as much backward, and forward again; of the MLP the second product is not recomputed.
    linear = 4 * setting.tokens * model.hidden_size * model.mlp_hidden * (3 + 0.5 * recomputed)
    seconds = linear / gpu.matmul.value
    if not model.text_only:
        attention = 4 * setting.tokens**2 * model.hidden_size
        forward, backward = (gpu.attention(model.head_dim, backward=b).value for b in (False, True))
        seconds += attention * ((1 + (parallel.policy == "full")) / forward + 2.5 / backward)
    return per_rank * seconds


def plan(setting: Setting, base: ParallelConfig | None = None, *, run: Mapper = map) -> Plan:
    """The fastest configuration that fits.

    Fastest is by tokens per second over all ranks: a spread over fewer groups has fewer samples in a step, unless
    setting.samples fixes them. Without rates (no GPU profile, or another precision than bf16) it is the one that
    recomputes and moves least, of those the one with the smallest sp_degree.

    Args:
        setting: what is given.
        base: precision, attention provider and what else holds across strategies; bf16 if not given.
        run: what maps the search over spreads, such as a pool's; builtins.map runs them one after the other.

    Raises:
        ValueError: nothing fits, or the precision cannot be predicted.
    """
    base = base or ParallelConfig(precision="bf16")
    check_foreseeable(replace(base, engine="fsdp2-zero2"), "plan 'auto'")
    possible, why_not = [], []
    for spread in spreads(setting.world_size, base):
        reason = impossible(setting, spread)
        if reason is None:
            possible.append(spread)
        else:
            why_not.append((spread_name(spread), reason))
    found = list(run(partial(search_spread, setting), possible))
    fitting = [one.best for one in found if one.best is not None]
    refused = tuple(itertools.chain.from_iterable(one.refused for one in found))
    if not fitting:
        raise ValueError(_nothing_fits(setting, refused))
    order = {policy: place for place, policy in enumerate(ORDER)}
    if all(need.seconds is not None for need in fitting):
        fitting.sort(key=lambda need: (need.seconds or math.inf) / need.samples)
    else:
        fitting.sort(key=lambda need: (order[need.policy], need.parallel.sp_degree))
    return Plan(
        setting=setting,
        best=fitting[0],
        runners_up=tuple(fitting[1:]),
        refused=refused,
        impossible=tuple(why_not),
        runs=sum(one.runs for one in found),
    )


def spread_name(parallel: ParallelConfig) -> str:
    """Strategy and degrees in words."""
    if parallel.strategy == "local":
        return "local"
    hybrid = f" ({parallel.ulysses_degree} x {parallel.sp_degree // (parallel.ulysses_degree or 1)})"
    return f"{parallel.strategy} SP {parallel.sp_degree}{hybrid if parallel.ulysses_degree else ''}"


def in_words(found: Plan) -> str:
    """The choice, what it needs and by how much it is ahead, in one line."""
    best, setting, gib = found.best, found.setting, 2**30
    tile = f", mlp_tile {best.parallel.mlp_tile}" if best.parallel.mlp_tile else ""
    words = (
        f"{spread_name(best.parallel)}, {best.policy}{tile}, {best.parallel.engine}: {best.device_bytes / gib:.4g} of "
        f"{setting.limit_bytes / gib:.4g} GiB per rank"
    )
    speed = found.tokens_per_s(best)
    if speed is None or setting.gpu is None:
        return f"{words}, least that is recomputed and moved; predicted"
    words += f", {speed[0]:,.0f} tokens/s predicted for {setting.gpu.name}"
    if not found.runners_up:
        return words
    second = found.runners_up[0]
    behind = found.tokens_per_s(second)
    assert behind is not None
    return (
        f"{words}, then {spread_name(second.parallel)}, {second.policy} ({100 * (1 - behind[0] / speed[0]):.2g} % less)"
    )


def _nothing_fits(setting: Setting, refused: tuple[Refused, ...]) -> str:
    gib = 2**30
    closest = min(refused, key=lambda one: one.device_bytes, default=None)
    limit = f"{setting.limit_bytes / gib:.4g} GiB per rank"
    if closest is None:
        return f"plan: no configuration can run on {setting.world_size} ranks"
    at_least = "" if closest.exact else "at least "
    host = (
        f" and {closest.host_bytes / gib:.4g} of {setting.host_limit_bytes / gib:.4g} GiB of host memory"
        if closest.host_bytes
        else ""
    )
    return (
        f"plan: nothing fits {limit}; the closest, {spread_name(closest.parallel)} under {closest.parallel.policy} "
        f"with {closest.parallel.engine}, needs {at_least}{closest.device_bytes / gib:.4g} GiB{host}; use more "
        "GPUs, GPUs with more memory, more host memory or shorter sequences"
    )
