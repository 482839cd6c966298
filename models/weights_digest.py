"""What weights a network has, in a few digits: whether two folders hold the same model, wherever they lie."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

# Of larger tensors evenly spaced elements stand for all: training moves every one, and reading 40 GB takes long.
_ELEMENTS = 1 << 20


def weights_digest(module: nn.Module, *also: object) -> str:
    """32 hex digits (BLAKE2b) over the names, dtypes, shapes and values of all parameters and buffers.

    Args:
        module: on any device; of tensors of more than 2^20 elements as many evenly spaced ones are read.
        also: what else decides the network's results, by its repr.
    """
    digest = hashlib.blake2b(repr(also).encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().flatten()
    sample = flat[:: max(1, flat.numel() // _ELEMENTS)]
    return sample.contiguous().cpu().view(torch.uint8).numpy().data
