"""What every op of a step costs: FLOPs, bytes of memory traffic, bytes sent, workspace. Shapes only, no time.

Strategy ops (`longreel::exchange_attention` ...) are opened: their Python body runs on fake tensors, so that the
exchanges, projections and attention inside are seen one by one, with their buffers. Attention under `sdpa-flash` and
`torch` is opened for its buffers and priced as one op. The other ops of longreel.kernels are taken as one fused kernel
each (read the inputs, write the results) unless asked to open them too. Bytes of any other op: every argument read,
every result written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

# Private: the Python function behind a torch.library.custom_op. Used in this file only.
from torch._library.custom_ops import OPDEFS
from torch.utils.flop_counter import flop_registry

from longreel.parallel import comm
from longreel.parallel.predict.lifetimes import tensors_in

Kind = Literal["matmul", "attention", "memory", "collective"]

# Places of FastSeq's arguments `chunked` and `group`.
_CHUNKED_ARGUMENT = {"fastseq_attention": -2, "fastseq_attention_backward": -1}
_GROUP_ARGUMENT = {"fastseq_attention": -4, "fastseq_attention_backward": -2}
_FLASH_BACKWARD = "_scaled_dot_product_flash_attention"


@dataclass(frozen=True, slots=True)
class OpCost:
    """One call of an op, as one rank sees it.

    Args:
        kind: how it is priced.
        name: op, without overload.
        phase: `forward`, `backward` or `optimizer`.
        scope: the strategy op that it ran inside, or empty.
        flops: of matrix products, by the op's registered formula; element-wise work does not count, as usual for MFU.
        bytes: arguments read plus results written; for a collective the bytes this rank sends.
        group: for a collective, the process group's name. head_dim: for attention. seq_len: the same; queries and keys,
            the geometric mean where they differ.
        chunks: for a collective, of how many chunks of heads or of tokens it is one; the strategy's op attends to one
            while others are in flight.
    """

    kind: Kind
    name: str
    phase: str
    scope: str
    flops: int
    bytes: int
    group: str = ""
    head_dim: int = 0
    chunks: int = 1
    seq_len: int = 0


class OpLedger:
    """Observer of a StorageTracker that counts equal op calls.

    Args:
        open_pointwise: look inside the pointwise ops (eager fp32 temporaries and all) instead of taking them as fused.

    Attributes:
        costs: calls per OpCost.
        phase: name that calls are filed under; assign to change it.
    """

    def __init__(self, *, open_pointwise: bool = False) -> None:
        self.costs: Counter[OpCost] = Counter()
        self.phase = "forward"
        self._open_pointwise = open_pointwise
        self._open: list[Any] = []
        self._chunks = 1

    def body(self, func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        """See OpObserver."""
        if func.namespace != "longreel" or not self._opens(func, args):
            return None
        self._open.append(func)
        if _name(func).startswith("exchange_attention"):
            self._chunks = args[-1]
        elif _name(func) in _CHUNKED_ARGUMENT:
            group = args[_GROUP_ARGUMENT[_name(func)]]
            self._chunks = comm.group_size(group) if args[_CHUNKED_ARGUMENT[_name(func)]] else 1
        return _body(func)

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        """See OpObserver."""
        opened = bool(self._open) and self._open[-1] is func
        if opened:
            self._open.pop()
        priced_outside = any(_is_attention(f) for f in self._open)
        if not priced_outside and not (opened and not _is_attention(func)):
            self._price(func, args, kwargs, result)
        return _workspace(func, args)

    def _opens(self, func: Any, args: tuple[Any, ...]) -> bool:
        if _is_attention(func):
            # A provider that launches a kernel of its own has no body to run on fake tensors.
            return args[-1] in ("sdpa-flash", "torch")
        return self._open_pointwise or not _is_kernel(func)

    def _price(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if _is_view(func):
            return
        scope = next((_name(f) for f in self._open if not _is_attention(f)), "")
        group, head_dim, seq_len, flops = "", 0, 0, 0
        kind: Kind = "memory"
        if func.namespace == "c10d":
            sent, group = _sent(func, args)
            if not sent:
                return
            # FastSeq's output is exchanged whole.
            in_chunks = scope.startswith("exchange_attention") or (scope and _name(func) == "send")
            chunks = self._chunks if in_chunks else 1
            self.costs[OpCost("collective", _name(func), self.phase, scope, 0, sent, group, chunks=chunks)] += 1
            return
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None and not _is_memory_bound(func):
            flops = formula(*args, **kwargs, out_val=result)
            kind = "attention" if _is_attention(func) else "matmul"
            if kind == "attention":
                head_dim = result[0].shape[-1]
                seq_len = _pairs_root(func, result, flops)
        moved = sum(_bytes(tensor) for tensor in tensors_in((args, tuple(kwargs.values()), result)))
        # Allocation alone moves nothing.
        if moved and not _name(func).startswith(("empty", "new_empty")):
            cost = OpCost(kind, _name(func), self.phase, scope, flops, moved, group, head_dim, seq_len=seq_len)
            self.costs[cost] += 1


def _pairs_root(func: Any, result: Any, flops: int) -> int:
    """Square root of the (query, key) pairs of one head in an attention op."""
    first = result if isinstance(result, Tensor) else result[0]
    products = 5 if _name(func).endswith("backward") else 2
    per_pair = 2 * products * first.shape[0] * first.shape[-2] * first.shape[-1]
    return math.isqrt(flops // per_pair) if per_pair else 0


def _body(func: Any) -> Callable[..., Any]:
    return OPDEFS[f"longreel::{_name(func)}"]._init_fn


@cache
def _name(func: Any) -> str:
    return func.overloadpacket.__name__


@cache
def _is_view(func: Any) -> bool:
    return func.is_view or _name(func) == "_unsafe_view"


@cache
def _is_attention(func: Any) -> bool:
    return func.namespace == "longreel" and _name(func).startswith("attention")


@cache
def _is_memory_bound(func: Any) -> bool:
    """Whether func is one of longreel.kernels but attention: pointwise ops, layout changes, the merge by lse."""
    return func.namespace == "longreel" and not _is_attention(func) and _is_kernel(func)


def _is_kernel(func: Any) -> bool:
    return _body(func).__module__.startswith("longreel.kernels.")


def _workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes a library op holds inside on CUDA and frees before it returns.

    FlashAttention-2's backward sums dQ in fp32 [B, S, H, D padded to a multiple of 32], S rounded up to 128, and keeps
    one fp32 row sum per query. Other libraries' workspaces are part of the reserve in hardware.py.
    """
    name = _name(func)
    if not (name.startswith(_FLASH_BACKWARD) and name.endswith("backward")):
        return 0
    batch, heads, seq_len, head_dim = args[1].shape
    rows = batch * heads * (-(-seq_len // 128) * 128)
    return 4 * rows * (-(-head_dim // 32) * 32 + 1)


def _sent(func: Any, args: tuple[Any, ...]) -> tuple[int, str]:
    """Bytes this rank sends to others in a c10d op, and its group's name; 0 for the receiving side."""
    tensors = list(tensors_in(args))
    pg = next(a for a in args if isinstance(a, torch.ScriptObject))
    group = dist.ProcessGroup.unbox(pg)
    size = group.size()
    name = _name(func)
    if name == "send":
        sent = _bytes(tensors[0])
    elif name in ("recv_", "barrier"):
        sent = 0
    elif name == "_allgather_base_":
        sent = _bytes(tensors[1]) * (size - 1)
    elif name == "_reduce_scatter_base_":
        sent = _bytes(tensors[0]) * (size - 1)
    elif name == "alltoall_base_":
        sent = _bytes(tensors[1]) * (size - 1) // size
    elif name == "allreduce_":
        # A ring: reduce-scatter, then all-gather.
        sent = 2 * _bytes(tensors[0]) * (size - 1) // size
    else:
        raise ValueError(f"no traffic formula for the collective c10d::{name}; add it to predict/ledger.py")
    return sent, group.group_name


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
