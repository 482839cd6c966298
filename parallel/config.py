"""How a model is spread over ranks: data only, checked on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Strategy = Literal["local", "ulysses", "fastseq", "ring", "usp"]
Engine = Literal["fsdp2-zero2", "fsdp2-zero3", "ddp", "colossalai"]
Policy = Literal["none", "full", "keep_attention", "offload", "auto"]
FastSeqOverlap = Literal["auto", "projection", "attention"]
Exchange = Literal["p2p", "symmetric"]
Precision = Literal["fp32", "bf16", "fp16", "fp64"]

STRATEGIES: tuple[str, ...] = get_args(Strategy)
ENGINES: tuple[str, ...] = get_args(Engine)
# Those that a model runs under: `auto` becomes one of them.
POLICIES: tuple[str, ...] = tuple(policy for policy in get_args(Policy) if policy != "auto")

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
# What the planner chooses, whatever a preset says.
CHOSEN_BY_PLAN = (
    "strategy",
    "sp_degree",
    "ulysses_degree",
    "head_chunks",
    "fastseq_overlap",
    "fastseq_keep_gathered",
    "exchange",
    "engine",
    "mlp_tile",
    "policy",
)
# Computed in over fp32 master parameters.
HALF_PRECISIONS = ("bf16", "fp16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Sequence parallelism, sharding engine, activation policy and precision of one run.

    Args:
        strategy: `local` (no sequence parallelism), `ulysses`, `fastseq`, `ring`, or `usp` (Ulysses times ring).
        sp_degree: P, ranks that share one sample's sequence; 1 for `local`.
        sp_across_nodes: let the ranks of one sequence lie on several nodes, whose network then carries the exchanges;
            of `usp` the U ranks stay on one. Without it that is an error.
        ulysses_degree: of `usp`, U consecutive ranks that split the heads; sp_degree / U ranks form each ring.
        head_chunks: of `ulysses` and `usp`, parts that a rank's heads are exchanged and attended in, so that exchanges
            hide behind attention; divides the heads of a rank. None: chosen by length.
        fastseq_overlap: of `fastseq`, what the gather hides behind: the `projection`, `attention` as well, or `auto`.
        exchange: of `fastseq`, `ring` and `usp`, what chunks travel by: `p2p` (sends and receives of NCCL or gloo) or
            `symmetric` (peers' memory read by copy engines; GPUs of one node with NVLink). All-to-alls are NCCL's.
        fastseq_keep_gathered: of `fastseq`: backward reuses the gathered hidden states instead of gathering them again,
            for sp_degree times the memory of a rank's own in every block under policy `none`, in one block at a time
            under `full`; the other policies keep attention's output alone.
        engine: `fsdp2-zero2` (parameters kept gathered between forward and backward), `fsdp2-zero3`, `ddp`,
            or `colossalai` (ZeRO-2 by LowLevelZeroPlugin; `make setup-colossalai`, CUDA only).
        policy: activation policy: `none` keeps what backward needs, `full` recomputes each block, `keep_attention`
            recomputes all of it but self-attention, whose output and log-sum-exp are kept, `offload` does the same with
            what is kept, and the block's input, in host memory, `auto` becomes the cheapest of these that fits
            (longreel.parallel.predict.policy) before a run starts.
        host_memory_gib: of `offload` and `auto`: host memory that one rank may hold. None: no limit for `offload`, a
            share of the node's for `auto`.
        memory_limit_gib: of `auto`: memory that the tensors of one rank may take; None: that of its CUDA device, less a
            reserve.
        mlp_tile: tokens that the MLP, the final layer and the loss take at a time, so that the MLP's hidden layer, the
            final layer's modulated tokens and the loss's fp32 terms of the whole sequence never live; backward computes
            them again. None: all at once.
        precision: `bf16` and `fp16` compute in that dtype over fp32 master parameters, `fp16` (`fsdp2` only) with the
            loss scaled as far as gradients stay finite; `fp32` and `fp64` use one dtype throughout.
        attention_provider: see longreel.kernels.resolve_attention_provider.
    """

    strategy: Strategy = "local"
    sp_degree: int = 1
    sp_across_nodes: bool = False
    ulysses_degree: int | None = None
    head_chunks: int | None = None
    fastseq_overlap: FastSeqOverlap = "auto"
    fastseq_keep_gathered: bool = False
    exchange: Exchange = "p2p"
    engine: Engine = "fsdp2-zero2"
    policy: Policy = "none"
    host_memory_gib: float | None = None
    memory_limit_gib: float | None = None
    mlp_tile: int | None = None
    precision: Precision = "fp32"
    attention_provider: str = "auto"

    def __post_init__(self) -> None:
        choices = (
            ("strategy", STRATEGIES),
            ("fastseq_overlap", get_args(FastSeqOverlap)),
            ("exchange", get_args(Exchange)),
            ("engine", ENGINES),
            ("policy", get_args(Policy)),
            ("precision", tuple(DTYPES)),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; there are {', '.join(allowed)}")
        if self.sp_degree < 1:
            raise ValueError(f"sp_degree must be at least 1, got {self.sp_degree}")
        for name, goes_with in (("host_memory_gib", ("offload", "auto")), ("memory_limit_gib", ("auto",))):
            gib = getattr(self, name)
            if gib is not None and (self.policy not in goes_with or not 0 < gib < math.inf):
                raise ValueError(
                    f"{name} must be positive and goes with policy {' or '.join(map(repr, goes_with))}, got {gib} with "
                    f"policy {self.policy!r}"
                )
        exchanges_heads = self.strategy == "ulysses" or (self.strategy == "usp" and self.ulysses_degree != 1)
        if self.head_chunks is not None and not (exchanges_heads and self.head_chunks >= 1):
            raise ValueError(
                "head_chunks must be at least 1 and goes with strategy 'ulysses', or 'usp' with an ulysses_degree "
                f"above 1, got {self.head_chunks} with strategy {self.strategy!r}, ulysses_degree {self.ulysses_degree}"
            )
        if self.fastseq_keep_gathered and (self.strategy != "fastseq" or self.policy in ("keep_attention", "offload")):
            raise ValueError(
                "fastseq_keep_gathered goes with strategy 'fastseq' and policy 'none' or 'full', got strategy "
                f"{self.strategy!r}, policy {self.policy!r}"
            )
        if self.fastseq_overlap != "auto" and self.strategy != "fastseq":
            raise ValueError(
                f"fastseq_overlap {self.fastseq_overlap!r} goes with strategy 'fastseq', got strategy "
                f"{self.strategy!r}; leave it out"
            )
        if self.mlp_tile is not None and self.mlp_tile < 1:
            raise ValueError(f"mlp_tile must be at least 1 token, got {self.mlp_tile}")
        if self.strategy == "local" and self.sp_degree > 1:
            raise ValueError(
                f"strategy 'local' does not split the sequence, but sp_degree is {self.sp_degree}; "
                f"use sp_degree 1, or strategy {', '.join(s for s in STRATEGIES if s != 'local')}"
            )
        if (self.ulysses_degree is None) == (self.strategy == "usp"):
            raise ValueError(
                f"strategy 'usp' needs a ulysses_degree; divisors of sp_degree {self.sp_degree}: "
                f"{', '.join(map(str, _divisors(self.sp_degree)))}"
                if self.strategy == "usp"
                else f"ulysses_degree {self.ulysses_degree} is of strategy 'usp' only, got strategy {self.strategy!r}"
            )
        if self.ulysses_degree is not None and self.ulysses_degree not in _divisors(self.sp_degree):
            raise ValueError(
                f"ulysses_degree {self.ulysses_degree} does not divide sp_degree {self.sp_degree}; "
                f"degrees that do: {', '.join(map(str, _divisors(self.sp_degree)))}"
            )
        if self.exchange == "symmetric":
            self._check_symmetric()
        if self.engine == "ddp" and self.precision in HALF_PRECISIONS:
            raise ValueError(
                "engine 'ddp' has no mixed precision; use precision fp32, or engine fsdp2-zero2 or fsdp2-zero3 for "
                f"{self.precision}"
            )
        if self.engine == "colossalai" and self.precision == "fp16":
            raise ValueError("engine 'colossalai' takes no precision fp16; use bf16, or engine fsdp2-zero2")

    def _check_symmetric(self) -> None:
        """ValueError where exchange `symmetric` would have nothing to do, or no memory that all ranks can read."""
        only_all_to_all = self.strategy == "usp" and self.ulysses_degree == self.sp_degree
        if self.strategy not in ("fastseq", "ring", "usp") or only_all_to_all:
            raise ValueError(
                "exchange 'symmetric' goes with strategy 'fastseq', 'ring', or 'usp' with an ulysses_degree below "
                f"sp_degree, got strategy {self.strategy!r}, ulysses_degree {self.ulysses_degree}; "
                "all-to-alls take exchange 'p2p'"
            )
        if self.sp_across_nodes:
            raise ValueError(
                "exchange 'symmetric' reads memory of GPUs on one node, got sp_across_nodes; use exchange 'p2p' with it"
            )

    @property
    def heads_degree(self) -> int:
        """Ranks that the heads are split over, which must divide their number."""
        return {"ring": 1, "usp": self.ulysses_degree or 1}.get(self.strategy, self.sp_degree)

    def check_heads(self, num_heads: int) -> None:
        """ValueError unless the heads split evenly over heads_degree ranks, and those of one into head_chunks.

        It names the degrees or chunks that would work.
        """
        check_heads(num_heads, self.heads_degree, hybrid_degree=self.sp_degree if self.strategy == "usp" else None)
        if self.head_chunks is not None:
            check_head_chunks(self.head_chunks, num_heads // self.heads_degree)

    def dp_degree(self, world_size: int) -> int:
        """Data-parallel degree on world_size ranks; ValueError when sp_degree does not divide it."""
        if world_size % self.sp_degree:
            raise ValueError(
                f"sp_degree {self.sp_degree} does not divide the world size {world_size}; "
                f"degrees that do: {', '.join(map(str, _divisors(world_size)))}"
            )
        return world_size // self.sp_degree


def check_heads(num_heads: int, degree: int, *, hybrid_degree: int | None = None) -> None:
    """ValueError unless the heads split evenly over `degree` ranks; it names the degrees that would work.

    Args:
        num_heads: of the model.
        degree: ranks that split them: sp_degree, or ulysses_degree of a hybrid.
        hybrid_degree: sp_degree of a hybrid, which its ulysses_degree must divide too; None: not a hybrid.
    """
    if num_heads % degree:
        name = "sp_degree" if hybrid_degree is None else "ulysses_degree"
        both = num_heads if hybrid_degree is None else math.gcd(num_heads, hybrid_degree)
        raise ValueError(
            f"num_heads {num_heads} does not divide by {name} {degree}; degrees that work: "
            f"{', '.join(map(str, _divisors(both)))}; strategy ring takes any"
        )


def check_head_chunks(chunks: int, heads: int) -> None:
    """ValueError unless the `heads` of one rank split evenly into chunks; it names the numbers that would work."""
    if heads % chunks:
        raise ValueError(
            f"head_chunks {chunks} does not divide the {heads} heads of a rank; "
            f"what works: {', '.join(map(str, _divisors(heads)))}"
        )


def check_ranks(seq_len: int, degree: int) -> None:
    """ValueError when `degree` ranks are to share a sequence of fewer tokens (seq_len, text in it included)."""
    if degree > seq_len:
        raise ValueError(
            f"sp_degree {degree} is more ranks than the sequence has tokens ({seq_len}); "
            f"use sp_degree {max(seq_len, 1)} or less, or a longer sequence"
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
