"""Useful FLOPs of a training step in closed form: forward and backward once, no recomputation, no padding.

A multiply-add is 2 FLOP; backward of a Linear is 2x its forward, 1x where its input needs no gradient; backward of
attention 2.5x (five matrix products). Element-wise work does not count, as is usual for MFU.
"""

from __future__ import annotations

from longreel.models.config import DiTConfig
from longreel.models.dit import FREQUENCY_DIM, takes_text


def _linear(rows: int, width_in: int, width_out: int, *, input_gradient: bool = True) -> int:
    return 2 * rows * width_in * width_out * (3 if input_gradient else 2)


def _attention(queries: int, keys: int, channels: int) -> int:
    return 14 * queries * keys * channels


def useful_flops(config: DiTConfig, *, num_video: int) -> int:
    """FLOPs of one sample, forward and backward, on all devices together.

    Args:
        config: the model.
        num_video: video tokens (patches) of the sample; text takes config.max_text_tokens where the model has any.
    """
    width, text = config.hidden_size, config.max_text_tokens
    seq_len = num_video + (text if config.conditioning == "in_context" else 0)

    block = _linear(1, width, 6 * width)
    block += 2 * _linear(seq_len, width, config.mlp_hidden)
    if not config.text_only:
        block += _linear(seq_len, width, 3 * width) + _linear(seq_len, width, width)
        block += _attention(seq_len, seq_len, width)
    if config.conditioning == "cross":
        block += 2 * _linear(seq_len, width, width) + _linear(text, width, 2 * width)
        block += _attention(seq_len, text, width)

    ends = _linear(num_video, config.patch_dim, width, input_gradient=False)
    ends += _linear(1, FREQUENCY_DIM, width, input_gradient=False) + _linear(1, width, width)
    if takes_text(config):
        rows = 1 if config.conditioning == "adaln" else text
        ends += _linear(rows, config.text_dim, width, input_gradient=False)
    patch_volume = config.patch_dim // config.in_channels
    ends += _linear(1, width, 2 * width) + _linear(num_video, width, patch_volume * config.out_channels)
    return config.depth * block + ends
