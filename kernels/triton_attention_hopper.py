"""Provider `triton-hopper`: attention forward on TMA and wgmma with warp specialisation; backward as provider `triton`.

For sm_90 alone, half precision, and head_dim 16, 32, 64 or 128, or 8 more than one of the first three: 72 is computed
as 80 columns of scores and of output, the ninth eight of which also give the row sums. What it cannot take is an error,
not another kernel. It reads q, k and v as they are: strides must be multiples of 8 elements, storage 16-byte aligned.
A packed sequence reads on behind its last key: scores there are masked, and rows of v cleared in shared memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longreel.kernels import triton_attention
from longreel.kernels import triton_attention_tuning as tuning
from longreel.kernels.triton_attention_plan import Launch, count_tiles, strides_in_units
from longreel.kernels.triton_common import interpreting, launch_on

attention_bwd = triton_attention.attention_bwd
attention_packed_bwd = triton_attention.attention_packed_bwd

# (D0, DT): whole swizzled rows, and a tail of 8.
SPLITS = {16: (16, 0), 24: (16, 8), 32: (32, 0), 40: (32, 8), 64: (64, 0), 72: (64, 8), 128: (128, 0)}
# Multiprocessors of an H100 or H200 SXM, where there is no device to ask.
_PROCESSORS = 132
_GROUP_ROWS = 64
_MAX_ROWS = 2**31


def check_hopper(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError, naming what is missing, unless the kernel can take these tensors here."""
    instead = "; use provider 'triton'"
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] != 9:
        name = torch.cuda.get_device_name(q.device)
        raise ValueError(f"provider 'triton-hopper' needs compute capability 9.0, {q.device} is {name}{instead}")
    if q.device.type not in ("cuda", "meta") or interpreting():
        raise ValueError(
            f"provider 'triton-hopper' runs on a Hopper GPU only, not on {q.device} nor interpreted{instead}"
        )
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"q has dtype {q.dtype}; provider 'triton-hopper' computes in bfloat16 and float16{instead}")
    if q.shape[-1] not in SPLITS:
        raise ValueError(f"q has head_dim {q.shape[-1]}; provider 'triton-hopper' has {sorted(SPLITS)}{instead}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        strides = _strides(tensor)
        if any(stride % 8 or stride == 0 for stride in strides):
            raise ValueError(f"{name} has strides {tensor.stride()}; TMA needs multiples of 8 but 0{instead}")
        address = tensor.storage_offset() * tensor.element_size() if tensor.is_meta else tensor.data_ptr()
        if address % 16:
            raise ValueError(f"{name} starts {address % 16} bytes off a multiple of 16; TMA needs one{instead}")
        if tensor.shape[1] >= _MAX_ROWS:
            raise ValueError(f"{name} has {tensor.shape[1]} rows; TMA coordinates end at {_MAX_ROWS}{instead}")


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As reference.attention_fwd; one kernel.

    Raises:
        ValueError: as check_hopper.
    """
    check_hopper(q, k, v)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    if not k.numel():
        # A descriptor has no empty side.
        return out.zero_(), lse.fill_(float("-inf"))
    if q.numel():
        with launch_on(q):
            plan_forward(q, k, v, out, lse, softmax_scale, cu_seqlens_q, cu_seqlens_k).run()
    return out, lse


def plan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *,
    tiles: tuning.HopperTiles | None = None,
) -> Launch:
    """The launch that fills out and lse. Tensors as in attention(), none empty; meta tensors will do to compile it."""
    from longreel.kernels.triton_attention_hopper_kernel import attention_fwd_hopper_kernel

    batch, q_len, num_heads, head_dim = q.shape
    tiles = tiles or tuning.hopper_tiles(head_dim, k.shape[1])
    d0, dt = SPLITS[head_dim]
    block_m = tiles.consumers * _GROUP_ROWS
    num_tiles, segments = count_tiles(q_len, block_m, cu_seqlens_q)
    total_tiles = num_tiles * batch * num_heads
    descriptors = {}
    for name, tensor, rows in (("q", q, _GROUP_ROWS), ("k", k, tiles.block_n), ("v", v, tiles.block_n)):
        descriptors[f"{name}0"] = _descriptor(tensor, rows, d0)
        descriptors[f"{name}t"] = _descriptor(tensor, rows, dt) if dt else None
    strides = strides_in_units(o=out)
    arguments = {
        **descriptors,
        "out": out,
        "lse": lse,
        "cu_q": None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        "cu_k": None if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
        "scale": abs(softmax_scale),
        **strides,
        "num_heads": num_heads,
        "q_len": q_len,
        "k_len": k.shape[1],
        "num_tiles": num_tiles,
        "total_tiles": total_tiles,
        **segments,
        "D0": d0,
        "DT": dt,
        "BLOCK_N": tiles.block_n,
        "STAGES": tiles.num_stages,
        "CONSUMERS": tiles.consumers,
        "REGISTERS": tiles.registers,
        "POLY": tiles.poly,
        "VARLEN": cu_seqlens_q is not None,
        "NEGATE": softmax_scale < 0,
    }
    processors = _PROCESSORS
    if q.device.type == "cuda":
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return Launch(
        kernel=attention_fwd_hopper_kernel,
        num_programs=min(processors, total_tiles),
        arguments=arguments,
        num_warps=4,
        num_stages=1,
    )


def _strides(tensor: Tensor) -> list[int]:
    """Strides of [B, H, S]; a side of one row has any, here that of a contiguous row."""
    order = (0, 2, 1)
    return [tensor.stride(i) if tensor.shape[i] > 1 else tensor.shape[-1] for i in order]


def _descriptor(tensor: Tensor, rows: int, columns: int) -> Any:
    """TMA descriptor of [B, H, S, D] for boxes of rows x columns; rows and columns that are not there read as zero."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    swizzle = min(128, columns * 2) if columns >= 16 else 0
    batch, length, num_heads, head_dim = tensor.shape
    return TensorDescriptor(
        tensor,
        [batch, num_heads, length, head_dim],
        [*_strides(tensor), 1],
        [1, 1, rows, columns],
        NVMMASharedLayout(swizzle, 16, rank=4),
    )
