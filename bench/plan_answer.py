"""The planner's command line, what it asks of the planner, and its answer as JSON."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from longreel.bench.grids import TargetGrid
from longreel.bench.option_values import one_length
from longreel.parallel.predict.hardware import GPUProfile, get_profile
from longreel.parallel.predict.needs import Need, Setting
from longreel.parallel.predict.planner import Plan, Refused, plan, spread_name
from longreel.parallel.predict.predict import grid_of
from longreel.reports.records import Regime

SCHEMA_VERSION = 1
GiB = 2**30
# Of a node, where nothing is said.
HOST_GIB = 1024.0


# As in bench/sweep.py: 800k is 819,200.
_LENGTH = PrimitiveConstructorSpec(
    nargs=1,
    metavar="INT",
    instance_from_str=lambda words: one_length("tokens", words[0]),
    is_instance=lambda value: isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """Ask for the fastest configuration that fits a model, a length and some GPUs. All of the answer is predicted.

    Args:
        tokens: video tokens of one sample, such as 819200 or 800k (k is 1,024).
        gpus: GPUs; more than a node holds make whole nodes.
        target: GPU, such as h800, or a TOML file with one profile.
        profiles: TOML file with profiles of GPUs, whose names target may take.
        memory: memory of a GPU if it is not the target's, such as 80GB (taken as GiB, as drivers show it).
        host_memory: host memory of a node for policy offload, 1TB if not given.
        regime: full (self-attention over all tokens) or text_only (the published regime, in its layout).
        model: preset of the DiT.
        batch: samples of one step over all GPUs; one for each data-parallel group if not given.
        price: of one GPU for an hour, in any currency; gives the cost of a million tokens.
        json: print JSON.
        processes: that search at the same time; as many as there are cores if not given.
    """

    tokens: Annotated[int, _LENGTH]
    gpus: int = 8
    target: str = "H800"
    profiles: Path | None = None
    memory: str | None = None
    host_memory: str | None = None
    regime: Regime = "full"
    model: str = "dit-xl-2"
    batch: int | None = None
    price: float | None = None
    json: bool = False
    processes: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "gpus", "batch", "processes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.price is not None and not 0 < self.price < math.inf:
            raise ValueError(f"price must be positive, got {self.price}")

    @property
    def profile(self) -> GPUProfile:
        """The target, with the memory that was asked for."""
        target = self.target if self.profiles is None else f"{self.profiles}:{self.target}"
        profile = get_profile(target)
        return profile if self.memory is None else replace(profile, memory_bytes=parse_memory("memory", self.memory))

    @property
    def setting(self) -> Setting:
        """The question, as the planner takes it."""
        profile = self.profile
        profile.check_gpus(self.gpus)
        host = HOST_GIB * GiB if self.host_memory is None else parse_memory("host_memory", self.host_memory)
        if profile.usable_bytes <= 0:
            raise ValueError(f"memory: {self.memory or self.target} leaves nothing beside the reserve")
        return Setting(
            model=TargetGrid(regime=self.regime, seq_lens=(self.tokens,), model_preset=self.model).dit,
            world_size=self.gpus,
            grid=grid_of(self.tokens),
            samples=self.batch,
            limit_bytes=profile.usable_bytes,
            host_limit_bytes=int(host / min(self.gpus, profile.gpus_per_node)),
            gpu=profile,
        )


def parse_memory(option: str, text: str) -> int:
    """`80GB`, `80`, `1.5TB` -> bytes; GB and TB are taken as GiB and TiB. ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([gt]?)(i?b)?\s*", text, re.IGNORECASE | re.ASCII)
    found = int(float(match[1]) * GiB * (1024 if match[2].lower() == "t" else 1)) if match else 0
    if found < 1:
        raise ValueError(f"{option}: {text!r} is not a size; write 80GB or 1.5TB")
    return found


def answer(config: PlanConfig) -> Plan:
    """The plan, spreads searched in several processes where that is safe and pays.

    Raises:
        ValueError: nothing fits, or the question is no question.
    """
    setting = config.setting
    workers = config.processes or len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    with warnings.catch_warnings():
        # As in longreel.parallel.launch: nothing here writes into a prediction.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        if workers == 1:
            return plan(setting)
        # Forked, they need not import torch again; nothing has run on its threads so far.
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            return plan(setting, run=lambda search, spreads: pool.map(search, spreads, chunksize=1))


def cost_of_million(tokens_per_s: float, config: PlanConfig) -> float | None:
    """Of a million tokens, in the currency of config.price."""
    return None if config.price is None else config.price * config.gpus / 3600 / tokens_per_s * 1e6


def as_json(found: Plan, config: PlanConfig) -> dict[str, Any]:
    """The answer, with keys that stay: new ones may join under the same schema_version."""
    profile = config.profile
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "predicted",
        "question": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(config).items()},
        "target": {
            "name": profile.name,
            "memory_bytes": profile.memory_bytes,
            "usable_bytes": profile.usable_bytes,
            "host_bytes_per_gpu": found.setting.host_limit_bytes,
        },
        "best": _choice(found, found.best, config),
        "runners_up": [_choice(found, need, config) for need in found.runners_up],
        "does_not_fit": [_refused(one, found.setting) for one in found.refused],
        "cannot_run": [{"name": name, "reason": reason} for name, reason in found.impossible],
        "inputs": {name: asdict(rate) for name, rate in profile.rates(found.setting.model.head_dim).items()},
    }


def _choice(found: Plan, need: Need, config: PlanConfig) -> dict[str, Any]:
    speed, best = found.tokens_per_s(need), found.tokens_per_s(found.best)
    assert speed is not None
    assert best is not None
    return _configuration(need) | {
        "tokens_per_s": speed[0],
        "tokens_per_s_interval": list(speed[1:]),
        "step_s": need.seconds,
        "step_s_interval": [need.low, need.high],
        "samples_per_step": need.samples,
        "slower_by": 1 - speed[0] / best[0],
        "memory_bytes": need.device_bytes,
        "host_bytes": need.host_bytes,
        "cost_per_million_tokens": cost_of_million(speed[0], config),
    }


def _configuration(one: Need | Refused) -> dict[str, Any]:
    p = one.parallel
    fields = ("strategy", "sp_degree", "ulysses_degree", "policy", "mlp_tile", "engine")
    return {"name": spread_name(p), "flags": flags(one)} | {name: getattr(p, name) for name in fields}


def _refused(one: Refused, setting: Setting) -> dict[str, Any]:
    return _configuration(one) | {
        "memory_bytes": one.device_bytes,
        "memory_is_exact": one.exact,
        "usable_bytes": setting.limit_bytes,
        "host_bytes": one.host_bytes,
    }


def flags(one: Need | Refused) -> str:
    """What train.py is given for this configuration."""
    p = one.parallel
    words = [f"--strategy {p.strategy}", f"--sp-degree {p.sp_degree}"]
    if p.ulysses_degree is not None:
        words.append(f"--ulysses-degree {p.ulysses_degree}")
    words += [f"--policy {p.policy}", f"--engine {p.engine}"]
    if p.mlp_tile is not None:
        words.append(f"--mlp-tile {p.mlp_tile}")
    return " ".join([*words, f"--precision {p.precision}"])
