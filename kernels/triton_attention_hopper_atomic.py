"""Provider `triton-hopper-atomic`: the fastest form of either direction, for Hopper GPUs alone; not deterministic.

Forward as provider `triton-hopper`, backward as provider `triton-atomic`. What the forward cannot take is an error.
"""

from __future__ import annotations

from longreel.kernels import triton_attention_atomic, triton_attention_hopper

attention_fwd = triton_attention_hopper.attention_fwd
attention_bwd = triton_attention_atomic.attention_bwd
attention_packed_bwd = triton_attention_atomic.attention_packed_bwd
