"""Launches of the Triton attention kernels as data, so that those made from meta tensors can be compiled without a GPU.

No launch reads a value from the device: packed sequences get a grid with room for every tile they could need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longreel.kernels import triton_attention_tuning as tuning
from longreel.kernels.triton_attention_backward import attention_dkdv_kernel, attention_dq_kernel
from longreel.kernels.triton_attention_delta import attention_delta_kernel
from longreel.kernels.triton_attention_forward import attention_fwd_kernel
from longreel.kernels.triton_attention_tiles import split_head_dim
from longreel.kernels.triton_common import interpreting

# Strides are passed in these units where all divide by it: rows are then known to start at 16 bytes in half precision.
_ALIGN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One kernel launch: arguments by name, constants included; programs in a one-dimensional grid."""

    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    planned_programs: int = 1

    @property
    def options(self) -> dict[str, int]:
        """Compile options besides warps and stages."""
        return {} if self.max_registers is None else {"maxnreg": self.max_registers}

    def run(self) -> None:
        """Launch on the current device; an empty grid launches nothing."""
        if self.num_programs:
            self.kernel[self.num_programs,](
                **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages, **self.options
            )


def plan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Launch:
    """The launch that fills out and lse. Tensors as in attention(); meta tensors will do for compiling it."""
    tiles = _tiles("forward", q, k.shape[1])
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "lse": lse,
        "scale": abs(softmax_scale),
        "NEGATE": softmax_scale < 0,
        **strides_in_units(q=q, k=k, v=v, o=out),
    }
    return _tiled(attention_fwd_kernel, tiles, arguments, tiles.block_m, q.shape[1], q, k, cu_seqlens_q, cu_seqlens_k)


def plan_backward(
    grads: Sequence[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    qkv: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dq_sum: Tensor | None = None,
) -> list[Launch]:
    """The launches that fill the gradients of q, k, v, in this order: delta, dk and dv, dq.

    With dq_sum [B, H, S, D], fp32 zeros, the second is the last: it adds dq there, unscaled, in no fixed order.
    """
    q, k, v = qkv
    dq, dk, dv = grads
    cu = cu_seqlens_q, cu_seqlens_k
    by_key = _tiles("dkdv" if dq_sum is None else "fused", q, q.shape[1])
    by_query = _tiles("dq", q, k.shape[1])
    pad = by_key.block_m
    batch, q_len, num_heads, _ = q.shape
    num_row_tiles, segments = count_tiles(q_len, pad, cu_seqlens_q)
    rows = lse.new_empty(2, batch, num_heads, num_row_tiles * pad)
    shared = {
        "q": q,
        "k": k,
        "v": v,
        "dout": dout,
        "rows": rows,
        "scale": softmax_scale,
        "num_row_tiles": num_row_tiles,
        "num_pairs": batch * num_heads,
        "PAD": pad,
    }
    inputs = {"q": q, "k": k, "v": v, "g": dout}
    dkdv = {**shared, "dk": dk, "dv": dv, "dq": dq_sum, **strides_in_units(**inputs, dk=dk, dv=dv)}
    dkdv["ATOMIC"] = dq_sum is not None
    dquery = {**shared, "dq": dq, **strides_in_units(**inputs, dq=dq)}
    launches = [
        _plan_delta(out, dout, lse, dlse, rows, pad, num_row_tiles, segments, cu_seqlens_q),
        _tiled(attention_dkdv_kernel, by_key, dkdv, by_key.block_n, k.shape[1], q, k, *cu),
        _tiled(attention_dq_kernel, by_query, dquery, by_query.block_m, q.shape[1], q, k, *cu),
    ]
    return launches if dq_sum is None else launches[:2]


def _plan_delta(
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    rows: Tensor,
    pad: int,
    num_tiles: int,
    segments: dict[str, int],
    cu_seqlens_q: Tensor | None,
) -> Launch:
    batch, q_len, num_heads, head_dim = out.shape
    d0, d1 = split_head_dim(head_dim)
    arguments = {
        "out": out,
        "dout": dout,
        "lse": lse,
        "dlse": dlse,
        "rows": rows,
        "cu_q": None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        **strides_in_units(o=out, g=dout),
        **dict(zip(("s_lb", "s_lh", "s_ls"), (0, 0, 0) if dlse is None else dlse.stride(), strict=True)),
        "num_heads": num_heads,
        "q_len": q_len,
        "num_tiles": num_tiles,
        **segments,
        "HEAD_DIM": head_dim,
        "D0": d0,
        "D1": d1,
        "PAD": pad,
        "HAS_DLSE": dlse is not None,
        "VARLEN": cu_seqlens_q is not None,
    }
    return Launch(
        kernel=attention_delta_kernel,
        num_programs=num_tiles * batch * num_heads,
        arguments=arguments,
        num_warps=tuning.DELTA_WARPS,
        num_stages=1,
    )


def count_tiles(num_rows: int, block: int, cu_seqlens: Tensor | None) -> tuple[int, dict[str, int]]:
    """Tiles of `block` rows that a grid has room for, and what tile_bounds searches with."""
    if cu_seqlens is None:
        return -(-num_rows // block), {"num_segments": 0, "search_steps": 0}
    # See tile_bounds: every segment may end in a ragged tile.
    num_segments = cu_seqlens.numel() - 1
    num_tiles = num_rows // block + num_segments if num_rows else 0
    return num_tiles, {"num_segments": num_segments, "search_steps": num_segments.bit_length()}


def _tiled(
    kernel: Any,
    tiles: tuning.AttentionTiles,
    arguments: dict[str, Any],
    block: int,
    num_rows: int,
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Launch:
    """A kernel whose programs each own `block` of num_rows rows of one head."""
    batch, q_len, num_heads, head_dim = q.shape
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if offsets.device != q.device:
                raise ValueError(f"{name} is on {offsets.device}, q on {q.device}; the kernels read it there")
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    num_tiles, segments = count_tiles(num_rows, block, cu_seqlens_q)
    d0, d1 = split_head_dim(head_dim)
    sizes = {
        "cu_q": cu_seqlens_q,
        "cu_k": cu_seqlens_k,
        "num_heads": num_heads,
        "q_len": q_len,
        "k_len": k.shape[1],
        "num_tiles": num_tiles,
        **segments,
        "HEAD_DIM": head_dim,
        "D0": d0,
        "D1": d1,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "STAGES": tiles.num_stages,
        "VARLEN": cu_seqlens_q is not None,
    }
    return Launch(
        kernel=kernel,
        num_programs=num_tiles * batch * num_heads,
        arguments=arguments | sizes,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        max_registers=tiles.max_registers,
        planned_programs=tiles.planned_programs,
    )


def _tiles(direction: tuning.Direction, q: Tensor, length: int) -> tuning.AttentionTiles:
    if q.dtype == torch.bfloat16 and interpreting():
        raise ValueError(
            f"q has dtype {q.dtype}, which Triton's interpreter multiplies wrongly; "
            "use torch.float16 or torch.float32, or provider 'torch'"
        )
    return tuning.attention_tiles(direction, sum(split_head_dim(q.shape[-1])), q.dtype, length)


def strides_in_units(**tensors: Tensor) -> dict[str, int]:
    """ALIGN, and in its units s_<name><dim> for the dims b, s and h of each [B, S, H, D] tensor."""
    strides = {
        f"s_{name}{dim}": tensor.stride(index) if tensor.shape[index] > 1 else 0
        for name, tensor in tensors.items()
        for index, dim in enumerate("bsh")
    }
    align = math.gcd(_ALIGN, *strides.values())
    return {"ALIGN": align} | {name: stride // align for name, stride in strides.items()}
