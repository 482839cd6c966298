"""The layout changes around the all-to-all of sequence parallelism, as custom ops: longreel::sp_*.

Between tokens split over P ranks and heads split over P ranks, with packed = [P, B, s, G, h, D] on either side of the
exchange:

    [B, s, G, H, D] -- pack_heads -->    packed == all-to-all ==> packed -- unpack_tokens --> [B, T, G, h, D]
    [B, s, G, H, D] <-- unpack_heads --  packed <== all-to-all == packed <-- pack_tokens --   [B, T, G, h, D]

s tokens of this rank of all H heads; T <= P s tokens of the whole sequence of this rank's h = H / P heads. The rows
that P s has beyond T are padding, written as zeros and left out again. G tensors travel together (3 for q, k, v). Each
of a pair is the other's gradient. pack_heads adds the projection's bias on its way, and its backward sums that bias's
gradient: the GEMM runs without a bias, and the sum costs no pass of its own.
Bytes moved, n = B s G H D elements of e bytes: 2 n e each way.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longreel.kernels import reference
from longreel.kernels.checks import check_count, check_same, check_tensor
from longreel.kernels.memory_bound import count_no_flops
from longreel.kernels.pointwise import resolve_pointwise_provider


def _implementation(provider: str) -> ModuleType:
    if provider == "triton":
        from longreel.kernels import triton_sp_layout

        return triton_sp_layout
    return reference


@torch.library.custom_op("longreel::sp_pack_heads", mutates_args=())
def sp_pack_heads_op(x: Tensor, bias: Tensor | None, num_ranks: int, provider: str) -> Tensor:
    """See pack_heads()."""
    return _implementation(provider).sp_pack_heads_fwd(x, bias, num_ranks)


@torch.library.custom_op("longreel::sp_pack_heads_backward", mutates_args=())
def sp_pack_heads_backward_op(dpacked: Tensor, provider: str) -> tuple[Tensor, Tensor]:
    """dx [B, s, G, H, D] and dbias [G H D] of pack_heads() with a bias."""
    return _implementation(provider).sp_pack_heads_bwd(dpacked)


@torch.library.custom_op("longreel::sp_unpack_heads", mutates_args=())
def sp_unpack_heads_op(packed: Tensor, provider: str) -> Tensor:
    """See unpack_heads()."""
    return _implementation(provider).sp_unpack_heads_fwd(packed)


@torch.library.custom_op("longreel::sp_pack_tokens", mutates_args=())
def sp_pack_tokens_op(x: Tensor, num_ranks: int, rows: int, provider: str) -> Tensor:
    """See pack_tokens()."""
    return _implementation(provider).sp_pack_tokens_fwd(x, num_ranks, rows)


@torch.library.custom_op("longreel::sp_unpack_tokens", mutates_args=())
def sp_unpack_tokens_op(packed: Tensor, tokens: int, provider: str) -> Tensor:
    """See unpack_tokens()."""
    return _implementation(provider).sp_unpack_tokens_fwd(packed, tokens)


@sp_pack_heads_op.register_fake
def _(x: Tensor, bias: Tensor | None, num_ranks: int, provider: str) -> Tensor:
    batch, s, parts, heads, head_dim = x.shape
    return x.new_empty(num_ranks, batch, s, parts, heads // num_ranks, head_dim)


@sp_unpack_heads_op.register_fake
def _(packed: Tensor, provider: str) -> Tensor:
    ranks, batch, s, parts, heads, head_dim = packed.shape
    return packed.new_empty(batch, s, parts, ranks * heads, head_dim)


@sp_pack_heads_backward_op.register_fake
def _(dpacked: Tensor, provider: str) -> tuple[Tensor, Tensor]:
    ranks, batch, s, parts, heads, head_dim = dpacked.shape
    dx = dpacked.new_empty(batch, s, parts, ranks * heads, head_dim)
    return dx, dpacked.new_empty(parts * ranks * heads * head_dim)


@sp_pack_tokens_op.register_fake
def _(x: Tensor, num_ranks: int, rows: int, provider: str) -> Tensor:
    return x.new_empty(num_ranks, x.shape[0], rows, *x.shape[2:])


@sp_unpack_tokens_op.register_fake
def _(packed: Tensor, tokens: int, provider: str) -> Tensor:
    return packed.new_empty(packed.shape[1], tokens, *packed.shape[3:])


def _save_pack_heads(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, _, ctx.provider = inputs
    ctx.has_bias = bias is not None


def _pack_heads_grad(ctx: Any, dpacked: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.has_bias:
        return *sp_pack_heads_backward_op(dpacked, ctx.provider), None, None
    return sp_unpack_heads_op(dpacked, ctx.provider), None, None, None


def _save_unpack_heads(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, ctx.provider = inputs
    ctx.num_ranks = packed.shape[0]


def _save_pack_tokens(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, ctx.provider = inputs
    ctx.tokens = x.shape[1]


def _save_unpack_tokens(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, _, ctx.provider = inputs
    ctx.num_ranks, ctx.rows = packed.shape[0], packed.shape[2]


sp_pack_heads_op.register_autograd(_pack_heads_grad, setup_context=_save_pack_heads)
sp_unpack_heads_op.register_autograd(
    lambda ctx, dx: (sp_pack_heads_op(dx, None, ctx.num_ranks, ctx.provider), None), setup_context=_save_unpack_heads
)
sp_pack_tokens_op.register_autograd(
    lambda ctx, dpacked: (sp_unpack_tokens_op(dpacked, ctx.tokens, ctx.provider), None, None, None),
    setup_context=_save_pack_tokens,
)
sp_unpack_tokens_op.register_autograd(
    lambda ctx, dx: (sp_pack_tokens_op(dx, ctx.num_ranks, ctx.rows, ctx.provider), None, None),
    setup_context=_save_unpack_tokens,
)


count_no_flops(sp_pack_heads_op, sp_pack_heads_backward_op, sp_unpack_heads_op, sp_pack_tokens_op, sp_unpack_tokens_op)


def pack_heads(x: Tensor, *, num_ranks: int, bias: Tensor | None = None, provider: str = "auto") -> Tensor:
    """Heads of this rank's tokens, ordered by the rank that they go to, with the projection's bias added.

    Args:
        x: [B, s, G, H, D], a projection's output; D of any size (multiples of 8 move 16 bytes at a time).
        num_ranks: P, which must divide H; rank r gets heads r H / P and on.
        bias: [G H D] of that projection, or None.
        provider: see resolve_pointwise_provider.

    Returns:
        [P, B, s, G, H / P, D], contiguous; a view of x where there is one rank and no bias.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes or devices that do not fit, or a provider that cannot run.
    """
    check_tensor("x", x, "[B, s, G, H, D]")
    check_count("num_ranks", num_ranks, 1)
    heads = x.shape[3]
    if not heads:
        raise ValueError(f"x must have heads, got {list(x.shape)}")
    if heads % num_ranks:
        works = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(f"num_ranks {num_ranks} must divide the {heads} heads of x; what would: {works}")
    if bias is not None:
        check_same("bias", bias, "x", x)
        if list(bias.shape) != [x.shape[2:].numel()]:
            raise ValueError(f"bias must be [{x.shape[2:].numel()}] for x {list(x.shape)}, got {list(bias.shape)}")
    provider = resolve_pointwise_provider(provider, x)
    if num_ranks == 1 and bias is None and x.is_contiguous():
        return x.unsqueeze(0)
    return sp_pack_heads_op(x, bias, num_ranks, provider)


def unpack_heads(packed: Tensor, *, provider: str = "auto") -> Tensor:
    """All heads of this rank's tokens, from the ranks that held them: the inverse of pack_heads.

    Args:
        packed: [P, B, s, G, h, D], row r from rank r.
        provider: see resolve_pointwise_provider.

    Returns:
        [B, s, G, P h, D], contiguous; a view of packed where there is one rank.

    Raises:
        TypeError: an argument of another type.
        ValueError: packed has other dims, or a provider cannot run.
    """
    _check_packed(packed)
    provider = resolve_pointwise_provider(provider, packed)
    if packed.shape[0] == 1 and packed.is_contiguous():
        return packed.squeeze(0)
    return sp_unpack_heads_op(packed, provider)


def pack_tokens(x: Tensor, *, num_ranks: int, rows: int | None = None, provider: str = "auto") -> Tensor:
    """Tokens of this rank's heads, ordered by the rank that they go to, zeros after the last.

    Args:
        x: [B, T, G, h, D].
        num_ranks: P.
        rows: s, tokens of one rank with padding; T / P rounded up when None.
        provider: see resolve_pointwise_provider.

    Returns:
        [P, B, s, G, h, D], contiguous; a view of x where B = 1 and T = P s, as nothing moves then.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes that do not fit, or a provider that cannot run.
    """
    check_tensor("x", x, "[B, T, G, h, D]")
    check_count("num_ranks", num_ranks, 1)
    batch, tokens = x.shape[:2]
    rows = -(-tokens // num_ranks) if rows is None else rows
    check_count("rows", rows, 0)
    if num_ranks * rows < tokens:
        raise ValueError(f"rows {rows} x {num_ranks} ranks hold fewer than the {tokens} tokens of x; use more rows")
    provider = resolve_pointwise_provider(provider, x)
    if batch == 1 and tokens == num_ranks * rows and x.is_contiguous():
        return x.view(num_ranks, 1, rows, *x.shape[2:])
    return sp_pack_tokens_op(x, num_ranks, rows, provider)


def unpack_tokens(packed: Tensor, *, tokens: int | None = None, provider: str = "auto") -> Tensor:
    """The whole sequence of this rank's heads, from the ranks that held its tokens: the inverse of pack_tokens.

    Args:
        packed: [P, B, s, G, h, D], row r from rank r.
        tokens: T, tokens to keep; the padded P s when None.
        provider: see resolve_pointwise_provider.

    Returns:
        [B, T, G, h, D]; a view of packed where B = 1, as nothing moves then.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes that do not fit, or a provider that cannot run.
    """
    _check_packed(packed)
    padded = packed.shape[0] * packed.shape[2]
    tokens = padded if tokens is None else tokens
    check_count("tokens", tokens, 0)
    if tokens > padded:
        raise ValueError(f"tokens {tokens} must be 0 to {padded}, what packed {list(packed.shape)} holds")
    provider = resolve_pointwise_provider(provider, packed)
    if packed.shape[1] == 1 and packed.is_contiguous():
        return packed.view(1, padded, *packed.shape[3:]).narrow(1, 0, tokens)
    return sp_unpack_tokens_op(packed, tokens, provider)


def _check_packed(packed: Tensor) -> None:
    check_tensor("packed", packed, "[P, B, s, G, h, D]")
    if not packed.shape[0]:
        raise ValueError(f"packed must hold at least one rank, got {list(packed.shape)}")
