"""Two one-warp kernels that keep a CUDA stream busy until a time after they started, by the GPU's own clock.

The clock is %globaltimer, nanoseconds whatever the SM's frequency. It is one program of one warp, less than NCCL takes.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _global_ns():
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def start_clock_kernel(started_ptr):
    tl.store(started_ptr, _global_ns())


# One compilation, whatever the time.
@triton.jit(do_not_specialize=["nanoseconds"])
def hold_kernel(started_ptr, nanoseconds):
    end = tl.load(started_ptr) + nanoseconds
    now = _global_ns()
    while now < end:
        now = _global_ns()
    # Written, so that nothing of the loop is left out.
    tl.store(started_ptr, now)


def start_clock(started_ns: Tensor) -> None:
    """Note the time in started_ns, an int64 of one element, when the current stream gets here."""
    start_clock_kernel[(1,)](started_ns, num_warps=1)


def hold_from(started_ns: Tensor, seconds: float) -> None:
    """Keep the current stream until `seconds` after the time noted there; started_ns is overwritten."""
    hold_kernel[(1,)](started_ns, round(seconds * 1e9), num_warps=1)
