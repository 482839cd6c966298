"""Who computes an op: this project's kernels and their peers, each by name; a missing one says why it is missing.

`eager` is plain PyTorch, `compiled` is torch.compile of it. A peer is called as its users call it, its backend pinned;
nothing stands in for anything else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longreel import kernels
from longreel.bench import plain_ops
from longreel.bench.ops import ATTENTION_OPS, DTYPES, OPS, OpCase, scores_of
from longreel.bench.plain_ops import ADALN_EPS, Outputs
from longreel.kernels.attention import PROVIDERS as ATTENTION_PROVIDERS
from longreel.kernels.attention import resolve_attention_provider
from longreel.kernels.pointwise import PROVIDERS as POINTWISE_PROVIDERS
from longreel.kernels.triton_common import require_triton

Provider = Callable[..., Outputs]

# Scores of eager attention in memory, bytes, beyond which it is not tried.
MAX_SCORES_BYTES = 16 * 2**30

_SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ATTENTION_PEERS = ("eager", "compiled", *_SDPA, "flex", "flash-attn-2", "flash-attn-3", "flash-attn-4")
# What the kernels' own lists hold besides kernels: the specification, and peers that are called directly here.
_SPECIFICATION = "torch"
# Cases of a row of modulation per frame, and the op that they call with offsets.
_OF_FRAMES = {"adaln_frames": "adaln_modulate", "gated_adaln_frames": "gated_residual_adaln"}
# What a provider takes over from another as it is: timed once, under the other's name.
_SAME_AS = {
    ("triton-atomic", "forward"): "triton",
    ("triton-hopper", "backward"): "triton",
    ("triton-hopper-atomic", "forward"): "triton-hopper",
    ("triton-hopper-atomic", "backward"): "triton-atomic",
}


class Unavailable(Exception):
    """This provider cannot run this case here; the message says why."""


def kernel_providers(op: str) -> tuple[str, ...]:
    """This project's kernels of an op, as kernels/ lists them."""
    if op in ("clone", "matmul"):
        return ()
    known = ATTENTION_PROVIDERS if op in ATTENTION_OPS else POINTWISE_PROVIDERS
    return tuple(name for name in known if name != _SPECIFICATION and name not in _SDPA)


def providers_of(op: str) -> tuple[str, ...]:
    """Everything that is measured for an op by default: our kernels, then the peers."""
    if op in ("clone", "matmul"):
        return ("eager",)
    if op in ATTENTION_OPS:
        return (*kernel_providers(op), *ATTENTION_PEERS)
    peers = ("eager", "compiled", "liger") if op == "adaln_modulate" else ("eager", "compiled")
    return (*kernel_providers(op), *peers)


def known_providers() -> tuple[str, ...]:
    """Every name that some op knows, the specification included."""
    return tuple(dict.fromkeys([*(name for op in OPS for name in providers_of(op)), _SPECIFICATION]))


def same_as(provider: str, direction: str) -> str | None:
    """The provider whose kernel this one runs in that direction, None where it has its own."""
    return _SAME_AS.get((provider, direction))


def build(case: OpCase, provider: str, device: torch.device) -> Provider:
    """The callable that computes a case: inputs in the op's order -> outputs.

    Args:
        case: what it will be called on. provider: a name of known_providers().
        device: where the inputs are.

    Raises:
        Unavailable: it is not installed, not for this device, or not for this op or shape.
    """
    if provider in ("eager", "compiled"):
        return _plain(case, provider)
    if case.op in ATTENTION_OPS:
        attend = _attention(case, provider, device)
        if provider in _ours(case.op):
            return attend
        if case.op == "attention_clips":
            return plain_ops.by_clip(attend)
        return attend if case.op != "attention_packed" else lambda qkv: attend(*qkv.unbind(2))
    if provider in _ours(case.op):
        if provider == "triton":
            _or_unavailable(require_triton, device)
        return _pointwise(case, provider, device)
    if provider == "liger" and case.op == "adaln_modulate":
        return _liger(case, device)
    raise Unavailable(f"there is no {provider} for {case.op}")


def _ours(op: str) -> tuple[str, ...]:
    names = kernel_providers(op)
    return (*names, _SPECIFICATION) if names else ()


def _or_unavailable(check: Callable[..., Any], *arguments: Any) -> Any:
    """A check of the kernels, whose ValueError is the reason why a provider is missing."""
    try:
        return check(*arguments)
    except ValueError as error:
        raise Unavailable(str(error)) from None


def _plain(case: OpCase, provider: str) -> Provider:
    if case.op in ATTENTION_OPS:
        scores = scores_of(case) * case.element_size
        if scores > MAX_SCORES_BYTES:
            raise Unavailable(f"its scores alone take {scores / 2**30:,.0f} GiB; tried up to 16 GiB")
    plain = OPS[case.op].plain(case)
    # fullgraph: past its limit of recompilations torch.compile would run eagerly and say nothing.
    return torch.compile(plain, fullgraph=True, dynamic=False) if provider == "compiled" else plain


def _attention(case: OpCase, provider: str, device: torch.device) -> Provider:
    if provider in _ours(case.op):
        _or_unavailable(resolve_attention_provider, provider, device, DTYPES[case.dtype])
        if case.op == "attention_packed":
            return functools.partial(kernels.attention_packed, provider=provider)
        if case.op == "attention_clips":
            offsets = torch.tensor(plain_ops.clip_bounds(case.seq_len), device=device)
            return functools.partial(kernels.attention, cu_seqlens_q=offsets, cu_seqlens_k=offsets, provider=provider)
        return functools.partial(kernels.attention, provider=provider)
    if provider not in ATTENTION_PEERS:
        raise Unavailable(f"there is no {provider} for {case.op}")
    if device.type != "cuda" and provider != "sdpa-flash":
        raise Unavailable(f"{provider} needs a CUDA device, the tensors are on {device.type}")
    if provider in _SDPA:
        return functools.partial(_sdpa, _SDPA[provider])
    if provider == "flex":
        if case.op == "attention_clips":
            raise Unavailable("flex compiles anew for every length, and a call per clip has four")
        return _flex()
    return _flash_attn(provider)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    with sdpa_kernel([backend]):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return (out.transpose(1, 2),)


def _flex() -> Provider:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        return (compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2),)

    return run


# Provider -> module that holds flash_attn_func, and the distribution it comes in.
_FLASH_ATTN = {
    "flash-attn-2": ("flash_attn", "flash-attn"),
    "flash-attn-3": ("flash_attn_interface", "flash-attn-3"),
    "flash-attn-4": ("flash_attn.cute", "flash-attn-4"),
}


def _flash_attn(provider: str) -> Provider:
    name, distribution = _FLASH_ATTN[provider]
    function = getattr(_import(name, provider, distribution), "flash_attn_func", None)
    if function is None:
        raise Unavailable(f"{provider}: the module {name} that is installed has no flash_attn_func")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        found = function(q, k, v)
        return (found[0] if isinstance(found, tuple) else found,)

    return run


def _import(name: str, provider: str, distribution: str) -> ModuleType:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise Unavailable(f"{provider} is not installed (package {distribution})")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{provider} cannot be imported: {error}") from None


def _pointwise(case: OpCase, provider: str, device: torch.device) -> Provider:
    ranks = case.sp_degree
    layouts: dict[str, Provider] = {
        "sp_pack_heads": lambda x, bias: (kernels.pack_heads(x, num_ranks=ranks, bias=bias, provider=provider),),
        "sp_unpack_heads": lambda packed: (kernels.unpack_heads(packed, provider=provider),),
        "sp_pack_tokens": lambda x: (kernels.pack_tokens(x, num_ranks=ranks, provider=provider),),
        "sp_unpack_tokens": lambda p: (kernels.unpack_tokens(p, tokens=case.seq_len, provider=provider),),
    }
    if case.op in layouts:
        return layouts[case.op]
    function = getattr(kernels, _OF_FRAMES.get(case.op, case.op))
    options: dict[str, Any] = {"provider": provider}
    if case.op in _OF_FRAMES:
        options["cu_seqlens"] = torch.tensor(plain_ops.frame_bounds(case.seq_len), device=device)

    def run(*inputs: Tensor) -> Outputs:
        found = function(*inputs, **options)
        return found if isinstance(found, tuple) else (found,)

    return run


def _liger(case: OpCase, device: torch.device) -> Provider:
    """Liger's LayerNorm with weight 1 + scale and bias shift: for one sample that is adaLN, fused."""
    if device.type != "cuda":
        raise Unavailable(f"liger needs a CUDA device, the tensors are on {device.type}")
    if case.batch != 1:
        raise Unavailable(f"liger's LayerNorm has one weight for all samples, the batch is {case.batch}")
    function = _import("liger_kernel.ops.layer_norm", "liger", "liger-kernel").LigerLayerNormFunction

    def run(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        return (function.apply(x, 1 + scale[0], shift[0], ADALN_EPS),)

    return run
