"""Host time of launching one layer's forward, for each strategy: `python bench/overhead.py`.

One process plays one rank of a fake group, whose exchanges return at once. The kernels of longreel.kernels are replaced
by ones that allocate their results, so that what is left is what a GPU would wait for: Python, dispatch, autograd,
allocation, the start of exchanges. It does not hold the launches themselves (a Triton kernel's some 10-20 us each).
Heads are those of DiT-XL/2, four tokens per rank and 8 numbers per head. What is launched depends on neither, but on
the form that a strategy takes, which `auto` chooses by length: rows ask for it. Also on whether the ranks divide the
tokens and on whether clips are packed, which rows of attention on chunks show.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longreel.data.command_line import parse_arguments
from longreel.kernels.attention import attention_op, attention_packed_op
from longreel.kernels.lse_merge import merge_attention_op
from longreel.kernels.sp_layout import sp_pack_heads_op, sp_pack_tokens_op, sp_unpack_heads_op, sp_unpack_tokens_op
from longreel.models.sequence import SequenceLengths
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.predict.fake_world import fake_world
from longreel.parallel.strategies import build_strategy
from longreel.parallel.strategies.usp import MAX_CHUNKS

NUM_HEADS, ROWS = 16, 4
KERNELS = (
    attention_op,
    attention_packed_op,
    merge_attention_op,
    sp_pack_heads_op,
    sp_unpack_heads_op,
    sp_pack_tokens_op,
    sp_unpack_tokens_op,
)
# Name of a row and what it asks ParallelConfig for; -1 chunks are what `auto` takes of long sequences.
SPREADS: dict[str, dict[str, Any]] = {
    "ulysses": {"strategy": "ulysses"},
    "ulysses, most chunks": {"strategy": "ulysses", "head_chunks": -1},
    "fastseq, overlap projection": {"strategy": "fastseq", "fastseq_overlap": "projection"},
    "fastseq, overlap attention": {"strategy": "fastseq", "fastseq_overlap": "attention"},
    "fastseq, attention, odd": {"strategy": "fastseq", "fastseq_overlap": "attention"},
    "fastseq, attention, packed": {"strategy": "fastseq", "fastseq_overlap": "attention"},
    "ring": {"strategy": "ring"},
    "usp, ulysses_degree 2": {"strategy": "usp", "ulysses_degree": 2},
    "usp, ulysses_degree 2, chunks": {"strategy": "usp", "ulysses_degree": 2, "head_chunks": -1},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OverheadConfig:
    """Host time of launching one self-attention layer, forward, on one rank of a fake group.

    Args:
        sp_degree: P, ranks of the group; even, and a divisor of 16 heads.
        repeats: the least of so many is reported.
    """

    sp_degree: int = 8
    repeats: int = 300

    def __post_init__(self) -> None:
        if self.sp_degree not in (2, 4, 8, 16):
            raise ValueError(f"sp_degree must be 2, 4, 8 or 16, got {self.sp_degree}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")


def allocate_only() -> None:
    """From here on the kernels allocate their results on the CPU and compute nothing, for the rest of the process."""
    for op in KERNELS:
        # Private: what the op was given as its fake implementation. Used in this file only.
        op.register_kernel("cpu")(op._abstract_fn)


def layer(name: str, sp_degree: int, head_dim: int) -> Callable[[], Tensor]:
    """One self-attention layer's forward under a strategy of SPREADS, inside a fake world of sp_degree ranks."""
    options = dict(SPREADS[name])
    if options.get("head_chunks") == -1:
        heads = NUM_HEADS // options.get("ulysses_degree", sp_degree)
        options["head_chunks"] = max(n for n in range(1, MAX_CHUNKS + 1) if heads % n == 0)
    config = ParallelConfig(sp_degree=sp_degree, attention_provider="torch", **options)
    sp = build_strategy(config, build_mesh(sp_degree=sp_degree, ulysses_degree=config.ulysses_degree))
    width = NUM_HEADS * head_dim
    x, qkv = torch.randn(1, ROWS, width, requires_grad=True), nn.Linear(width, 3 * width)
    padded = sp_degree * ROWS
    valid = padded - name.endswith("odd")
    clips = (0, padded // 3, padded // 2, valid) if name.endswith("packed") else None
    lengths = SequenceLengths(valid=valid, padded=padded, cu_seqlens=clips)
    return lambda: sp.self_attention(x, qkv, num_heads=NUM_HEADS, lengths=lengths)


def measure(name: str, config: OverheadConfig) -> float:
    """Seconds of thread CPU time that one forward takes at least; allocate_only() comes first."""
    with fake_world(config.sp_degree):
        run = layer(name, config.sp_degree, head_dim=8)
        run()
        best = float("inf")
        for _ in range(config.repeats):
            began = time.thread_time()
            run()
            best = min(best, time.thread_time() - began)
        return best


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one `error:` line about a bad command."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        config = parse_arguments(OverheadConfig, words, prog="python bench/overhead.py")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    allocate_only()
    print(f"{'P = ' + str(config.sp_degree):30} ms per layer")
    for name in SPREADS:
        print(f"{name:30} {measure(name, config) * 1e3:12.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
