"""Ops of the DiT: each a custom op `longreel::<op>` with an eager specification in longreel.kernels.reference."""

from longreel.kernels.attention import attention, attention_packed, resolve_attention_provider
from longreel.kernels.pointwise import adaln_modulate, bias_gelu, gated_residual

__all__ = [
    "adaln_modulate",
    "attention",
    "attention_packed",
    "bias_gelu",
    "gated_residual",
    "resolve_attention_provider",
]
