"""Triton attention, launched: forward (out, lse), backward (dq, dk, dv), and a backward that writes one dqkv.

No launch reads a value from the device: packed sequences get a grid with room for every tile they could need.
Launches are planned as data first, so that the same plan, made from meta tensors, can be compiled without a GPU.
Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longreel.kernels import triton_attention_tuning as tuning
from longreel.kernels.checks import check_triton_dtype
from longreel.kernels.triton_attention_backward import (
    attention_delta_kernel,
    attention_dkdv_kernel,
    attention_dq_kernel,
)
from longreel.kernels.triton_attention_forward import attention_fwd_kernel
from longreel.kernels.triton_attention_tiles import split_head_dim
from longreel.kernels.triton_common import launch_on

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


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As reference.attention_fwd; one kernel.

    Raises:
        ValueError: a dtype the kernels do not compute in.
    """
    check_triton_dtype("q", q.dtype)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    with launch_on(q):
        plan_forward(q, k, v, out, lse, softmax_scale, cu_seqlens_q, cu_seqlens_k).run()
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.attention_bwd; three kernels, deterministic.

    Raises:
        ValueError: a dtype the kernels do not compute in.
    """
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    _backward_into(grads, dout, dlse, (q, k, v), out, lse, softmax_scale, cu_seqlens_q, cu_seqlens_k)
    return grads


def attention_packed_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """dqkv [B, S, 3, H, D]: the kernels write into its three slices, nothing is copied.

    Raises:
        ValueError: a dtype the kernels do not compute in.
    """
    dqkv = qkv.new_empty(qkv.shape)
    _backward_into(dqkv.unbind(2), dout, dlse, qkv.unbind(2), out, lse, softmax_scale, cu_seqlens, cu_seqlens)
    return dqkv


def _backward_into(
    grads: Sequence[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    qkv: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> None:
    check_triton_dtype("q", out.dtype)
    # The gradient of a sum arrives expanded from one element.
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    with launch_on(out):
        for launch in plan_backward(grads, dout, dlse, qkv, out, lse, softmax_scale, cu_seqlens_q, cu_seqlens_k):
            launch.run()


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
    tiles = _tiles("forward", q)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "lse": lse,
        "scale": abs(softmax_scale),
        "NEGATE": softmax_scale < 0,
        **_strides(q=q, k=k, v=v, o=out),
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
) -> list[Launch]:
    """The launches that fill the gradients of q, k, v, in this order: delta, dk and dv, dq."""
    q, k, v = qkv
    dq, dk, dv = grads
    cu = cu_seqlens_q, cu_seqlens_k
    by_key, by_query = _tiles("dkdv", q), _tiles("dq", q)
    pad = by_key.block_m
    batch, q_len, num_heads, _ = q.shape
    num_row_tiles, segments = _count_tiles(q_len, pad, cu_seqlens_q)
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
    dkdv = {**shared, "dk": dk, "dv": dv, **_strides(**inputs, dk=dk, dv=dv)}
    dquery = {**shared, "dq": dq, **_strides(**inputs, dq=dq)}
    return [
        _plan_delta(out, dout, lse, dlse, rows, pad, num_row_tiles, segments, cu_seqlens_q),
        _tiled(attention_dkdv_kernel, by_key, dkdv, by_key.block_n, k.shape[1], q, k, *cu),
        _tiled(attention_dq_kernel, by_query, dquery, by_query.block_m, q.shape[1], q, k, *cu),
    ]


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
        **_strides(o=out, g=dout),
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


def _count_tiles(num_rows: int, block: int, cu_seqlens: Tensor | None) -> tuple[int, dict[str, int]]:
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
    num_tiles, segments = _count_tiles(num_rows, block, cu_seqlens_q)
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


def _tiles(direction: tuning.Direction, q: Tensor) -> tuning.AttentionTiles:
    return tuning.attention_tiles(direction, sum(split_head_dim(q.shape[-1])), q.dtype)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """ALIGN, and in its units s_<name><dim> for the dims b, s and h of each [B, S, H, D] tensor."""
    strides = {
        f"s_{name}{dim}": tensor.stride(index) if tensor.shape[index] > 1 else 0
        for name, tensor in tensors.items()
        for index, dim in enumerate("bsh")
    }
    align = math.gcd(_ALIGN, *strides.values())
    return {"ALIGN": align} | {name: stride // align for name, stride in strides.items()}
