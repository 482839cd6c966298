"""What strategies over one process group share: slicing, gathering and bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longreel.kernels import resolve_attention_provider
from longreel.parallel import comm
from longreel.parallel.config import check_heads


@torch.library.custom_op("longreel::unshard", mutates_args=())
def unshard_op(x: Tensor, dim: int, group: str) -> Tensor:
    """All ranks' x, concatenated along dim; backward is shard_sum."""
    return torch.cat(comm.all_gather(x.contiguous(), group).unbind(0), dim=dim)


@torch.library.custom_op("longreel::shard_sum", mutates_args=())
def shard_sum_op(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's slice along dim of the sum of x over the ranks: a reduce-scatter; backward is unshard."""
    return comm.reduce_scatter(torch.stack(x.chunk(comm.group_size(group), dim)), group)


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


@unshard_op.register_fake
def _(x: Tensor, dim: int, group: str) -> Tensor:
    return _resized(x, dim, x.shape[dim] * comm.group_size(group))


@shard_sum_op.register_fake
def _(x: Tensor, dim: int, group: str) -> Tensor:
    return _resized(x, dim, x.shape[dim] // comm.group_size(group))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.dim, ctx.group = inputs


unshard_op.register_autograd(lambda ctx, g: (shard_sum_op(g, ctx.dim, ctx.group), None, None), setup_context=_save)
shard_sum_op.register_autograd(lambda ctx, g: (unshard_op(g, ctx.dim, ctx.group), None, None), setup_context=_save)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceGroup:
    """A named process group that shares a sequence, and the attention provider each rank uses.

    Args:
        group: name of the process group, from the `sp` axis of a mesh.
        degree: P, ranks of the group. A field, so that torch.compile need not look the group up.
        provider: see longreel.kernels.resolve_attention_provider.
    """

    group: str
    degree: int
    provider: str = "auto"

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's equal slice of x along dim; backward pads with zeros: no scaling, no collective.

        Raises:
            ValueError: P does not divide x's size along dim (pad first).
        """
        if x.shape[dim] % self.degree:
            raise ValueError(
                f"dim {dim} of x has size {x.shape[dim]}, not a multiple of the {self.degree} ranks; pad it"
            )
        size = x.shape[dim] // self.degree
        return x.narrow(dim, comm.group_rank(self.group) * size, size)

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' slices, concatenated along dim; backward reduce-scatters the sum."""
        return unshard_op(x, dim % x.dim(), self.group)

    def rows(self, seq_len: int) -> int:
        """s, tokens of one rank: seq_len / P rounded up."""
        return -(-seq_len // self.degree)

    def check_heads(self, num_heads: int) -> None:
        """ValueError unless the ranks divide the heads; names degrees that do."""
        check_heads(num_heads, self.degree)

    def resolved_provider(self, x: Tensor) -> str:
        """The attention implementation that runs for tensors like x."""
        return resolve_attention_provider(self.provider, x.device, x.dtype)
