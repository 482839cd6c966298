"""One point of a sweep as data, and the record it becomes."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from longreel.bench.peers import PEERS
from longreel.models.config import DiTConfig
from longreel.parallel.config import ParallelConfig, check_ranks
from longreel.parallel.predict.hardware import get_profile
from longreel.reports.records import Kind, Record, Regime, Status
from longreel.reports.turns import MIN_DECISIVE

# One frame of a sample, in patches: 16 x 16 is a 256x256 image through SD-VAE at patch 2.
FRAME_SIDE = 16

DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """How the steps of a measured point are sampled, after an untimed step on the same batch.

    Args:
        min_samples: steps timed at least; fewer than MIN_DECISIVE give no verdict. max_samples: and at most.
        budget_s: between the two, go on until this many seconds were timed.
        wall_cap_s: seconds of steps after which sampling ends with what there is, at least two samples.
    """

    min_samples: int = MIN_DECISIVE
    max_samples: int = 10
    budget_s: float = 0.6
    wall_cap_s: float = 600.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_samples <= self.max_samples:
            raise ValueError(f"need 1 <= min_samples <= max_samples, got {self.min_samples} and {self.max_samples}")
        for name in ("budget_s", "wall_cap_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be seconds, 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One configuration at one length.

    Args:
        kind: `measured`, `emulated` or `predicted`.
        model: the DiT. model_name: in words.
        parallel: how it is spread over num_devices ranks; attention provider named, not `auto`. Policy `auto` becomes
            the one chosen when the point runs.
        device: what the ranks are, in words. target: profile of the predicted or emulated GPU, None when measured.
        device_type: of measured ranks.
        seq_len: video tokens of one sample. batch_per_group: samples of one SP group, 1 when measured.
        is_baseline: the configuration that ratios refer to.
        peer: another project's implementation that runs in the strategy's place, see longreel.bench.peers; None: ours.
        gate_depth, gate_len: blocks and tokens that the gate's step is held to; None: those of the point.
        timing: of a measured point.
        refused: why this machine cannot run it, None where it can. chosen: why policy `auto` became the one it has.
        seed: of weights and data.
    """

    kind: Kind
    model: DiTConfig
    model_name: str
    parallel: ParallelConfig
    num_devices: int
    device: str
    seq_len: int
    batch_per_group: int = 1
    is_baseline: bool = False
    target: str | None = None
    device_type: DeviceType = "cpu"
    peer: str | None = None
    gate_depth: int | None = None
    gate_len: int | None = None
    timing: Timing = Timing()
    refused: str | None = None
    chosen: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.parallel.dp_degree(self.num_devices)
        if self.kind == "measured" and self.batch_per_group != 1:
            raise ValueError(
                f"batch_per_group must be 1 in measured points, whose oracle is one sample per data-parallel group; "
                f"got {self.batch_per_group}"
            )

    @property
    def regime(self) -> Regime:
        return "text_only" if self.model.text_only else "full"

    @property
    def dp_degree(self) -> int:
        return self.parallel.dp_degree(self.num_devices)

    @property
    def strategy(self) -> str:
        """What a record calls the strategy: ours, or the peer in its place."""
        return self.peer or self.parallel.strategy

    @property
    def impossible(self) -> str | None:
        """Why this point cannot run; None when it can."""
        if self.refused is not None:
            return self.refused
        try:
            self.parallel.check_heads(self.model.num_heads)
            in_context = self.model.max_text_tokens if self.model.conditioning == "in_context" else 0
            check_ranks(self.seq_len + in_context, self.parallel.sp_degree)
        except ValueError as error:
            return str(error)
        if self.peer is not None:
            if self.kind != "measured":
                return f"{self.peer} runs for real or not at all: nothing predicts or emulates it"
            return PEERS[self.peer].unavailable(self.device_type)
        if self.parallel.engine == "colossalai":
            if self.kind != "measured":
                return "engine colossalai runs for real or not at all: nothing predicts or emulates it"
            if importlib.util.find_spec("colossalai") is None:
                return "ColossalAI is not installed (make setup-colossalai)"
            if self.device_type != "cuda":
                return "engine colossalai runs on CUDA only"
        return None

    def config(self) -> dict[str, Any]:
        """The resolved configuration, as it goes into the record.

        Not `timing`: how often a point was timed does not make it another point. Nor what the gate was held to.
        """
        resolved: dict[str, Any] = {"model": asdict(self.model), "parallel": asdict(self.parallel), "seed": self.seed}
        if self.kind != "measured":
            resolved["target"] = None if self.target is None else _target(self.target)
        if self.peer is not None:
            resolved["peer"] = self.peer
        # As JSON gives it back: lists instead of tuples.
        return json.loads(json.dumps(resolved))

    def key(self, provenance: dict[str, Any]) -> str:
        """The key of every record of this point at this commit and in this environment, before it has run."""
        return self.record("skipped", reason="not run", provenance=provenance).key

    def record(self, status: Status, *, provenance: dict[str, Any], **outcome: Any) -> Record:
        """The record of this point with what became of it."""
        p = self.parallel
        if self.chosen is not None:
            provenance = provenance | {"policy": self.chosen}
        return Record(
            kind=self.kind,
            regime=self.regime,
            status=status,
            model=self.model_name,
            device=self.device,
            strategy=self.strategy,
            sp_degree=p.sp_degree,
            dp_degree=self.dp_degree,
            num_devices=self.num_devices,
            engine=p.engine,
            policy=p.policy,
            attention=p.attention_provider if self.peer is None else PEERS[self.peer].attention,
            seq_len=self.seq_len,
            batch_per_group=self.batch_per_group,
            is_baseline=self.is_baseline,
            config=self.config(),
            provenance=provenance,
            **outcome,
        )


def _target(target: str) -> Any:
    """A profile by its name; of a user's file its figures, as another file of that name is another GPU."""
    profile = get_profile(target)
    if profile.file is None:
        return profile.name
    return {name: value for name, value in asdict(profile).items() if value and name != "file"}
