"""Ops of the DiT: each a custom op `longreel::<op>` with an eager specification in longreel.kernels.reference.

They are differentiable once, in reverse mode. A tensor with a tangent of forward mode (torch.func.jvp, jacfwd, hessian)
is refused by the functions here; torch.ops.longreel.<op>, called directly, would return results without a tangent.
"""

from longreel.kernels.attention import attention, attention_packed, resolve_attention_provider
from longreel.kernels.lse_merge import merge_attention
from longreel.kernels.pointwise import adaln_modulate, bias_gelu, gated_residual, resolve_pointwise_provider
from longreel.kernels.residual_adaln import gated_residual_adaln
from longreel.kernels.sp_layout import pack_heads, pack_tokens, unpack_heads, unpack_tokens

__all__ = [
    "adaln_modulate",
    "attention",
    "attention_packed",
    "bias_gelu",
    "gated_residual",
    "gated_residual_adaln",
    "merge_attention",
    "pack_heads",
    "pack_tokens",
    "resolve_attention_provider",
    "resolve_pointwise_provider",
    "unpack_heads",
    "unpack_tokens",
]
