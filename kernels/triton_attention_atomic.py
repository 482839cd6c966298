"""Provider `triton-atomic`: as `triton`, with a backward of 5 matrix products instead of 7 that is not deterministic.

One kernel computes dk, dv and dq; every tile of keys adds its share of dq to fp32 memory (4 bytes an element of q)
atomically, so the order of the additions, and with it the last bits of dq, differs from run to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longreel.kernels import triton_attention

attention_fwd = triton_attention.attention_fwd


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
    """As reference.attention_bwd; two kernels.

    Raises:
        ValueError: a dtype the kernels do not compute in, or a GPU they do not compile for.
    """
    _check_device(q)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    triton_attention.backward_into(
        grads, dout, dlse, (q, k, v), out, lse, softmax_scale, cu_seqlens_q, cu_seqlens_k, atomic=True
    )
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
    """dqkv [B, S, 3, H, D], as triton_attention.attention_packed_bwd.

    Raises:
        ValueError: a dtype the kernels do not compute in, or a GPU they do not compile for.
    """
    _check_device(qkv)
    dqkv = qkv.new_empty(qkv.shape)
    triton_attention.backward_into(
        dqkv.unbind(2), dout, dlse, qkv.unbind(2), out, lse, softmax_scale, cu_seqlens, cu_seqlens, atomic=True
    )
    return dqkv


def _check_device(tensor: Tensor) -> None:
    # Compiled for sm_100 by triton 3.7.1 the kernel has no body.
    if tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device)[0] >= 10:
        name = torch.cuda.get_device_name(tensor.device)
        raise ValueError(f"provider 'triton-atomic' is not for compute capability 10.0 and up ({name}); use 'triton'")
