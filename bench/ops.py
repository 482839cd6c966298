"""The ops of a DiT block as benchmark cases: inputs, the work they must do, and their definition in plain PyTorch.

The plain form is what a model's author would write, in the tensors' own dtype: provider `eager`, what `compiled`
compiles, and, in fp32 or fp64, the oracle. Beside the ops stand two rooflines, `clone` and `matmul`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ADALN_EPS = 1e-6
# Ranks that the layout changes around all-to-all split the heads over, where these divide.
SP_DEGREE = 8
MLP_RATIO = 4

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpCase:
    """One op at one shape.

    Args:
        op: name in OPS. dtype: name in DTYPES.
        batch: B. seq_len: S, tokens. num_heads, head_dim: H and D; hidden size C = H D of ops without heads.
    """

    op: str
    dtype: str
    seq_len: int
    num_heads: int
    head_dim: int
    batch: int = 1

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"unknown op {self.op!r}; there are {', '.join(OPS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; there are {', '.join(DTYPES)}")
        for name in ("seq_len", "num_heads", "head_dim", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def hidden_size(self) -> int:
        """C, the width of a token."""
        return self.num_heads * self.head_dim

    @property
    def element_size(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize

    @property
    def sp_degree(self) -> int:
        """Ranks of the layout changes: the largest divisor of the heads up to SP_DEGREE."""
        return max(n for n in range(1, SP_DEGREE + 1) if self.num_heads % n == 0)

    def shape(self) -> dict[str, int]:
        """Sizes by name, as a record keeps them."""
        sizes = {"batch": self.batch, "seq_len": self.seq_len}
        if OPS[self.op].has_heads:
            return sizes | {"num_heads": self.num_heads, "head_dim": self.head_dim}
        return sizes | {"hidden_size": self.hidden_size}

    def label(self) -> str:
        """In one word, as test ids are read: attention-bf16-B1-S4096-H2-D72."""
        letters = {"batch": "B", "seq_len": "S", "num_heads": "H", "head_dim": "D", "hidden_size": "C"}
        return "-".join([self.op, self.dtype, *(f"{letters[name]}{size}" for name, size in self.shape().items())])


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """What an op is, apart from who computes it.

    Args:
        about: formula, in words.
        shapes: case -> shape of every input, by name. An input named lse* is fp32.
        plain: inputs in that order -> outputs; for a case.
        work: case -> (forward, backward) useful FLOPs if compute_bound, else fewest bytes.
        row_dims: dim of each input, then of each output, along which tokens are independent of each other; None for
            an input that all tokens share, whose gradient is a sum over tokens. Empty for attention.
        has_heads: shapes have num_heads and head_dim, not hidden_size.
        differentiable: there is a backward to time.
    """

    about: str
    shapes: Callable[[OpCase], dict[str, tuple[int, ...]]]
    plain: Callable[[OpCase], Callable[..., Outputs]]
    work: Callable[[OpCase], tuple[float, float]]
    row_dims: tuple[int | None, ...] = ()
    compute_bound: bool = False
    has_heads: bool = False
    differentiable: bool = True


def _attention_shapes(c: OpCase) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys("qkv", (c.batch, c.seq_len, c.num_heads, c.head_dim))


def _attention_flops(c: OpCase) -> tuple[float, float]:
    # Two matrix products forward, five backward; head_dim counts as it is.
    product = 2.0 * c.batch * c.num_heads * c.seq_len**2 * c.head_dim
    return 2 * product, 5 * product


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    """softmax(q k^T / sqrt(D)) v with all scores in memory. q [B, S, H, D], k and v [B, T, H, D]."""
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    return (torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v),)


def _plain_packed(qkv: Tensor) -> Outputs:
    return plain_attention(*qkv.unbind(2))


def _tokens(c: OpCase, ratio: int = 1) -> tuple[int, int, int]:
    return c.batch, c.seq_len, ratio * c.hidden_size


def _rows(c: OpCase) -> tuple[int, int]:
    return c.batch, c.hidden_size


def _times_bytes(forward: int, backward: int, ratio: int = 1) -> Callable[[OpCase], tuple[float, float]]:
    """Work of an op that moves its [B, S, ratio C] tensors this many times; vectors of size C do not count."""

    def work(c: OpCase) -> tuple[float, float]:
        size = float(math.prod(_tokens(c, ratio)) * c.element_size)
        return forward * size, backward * size

    return work


def _plain_adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    return (F.layer_norm(x, x.shape[-1:], eps=ADALN_EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1),)


def _plain_gated(x: Tensor, y: Tensor, gate: Tensor) -> Outputs:
    return (x + gate.unsqueeze(1) * y,)


def _plain_gated_adaln(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    (z,) = _plain_gated(x, y, gate)
    return z, *_plain_adaln(z, shift, scale)


def _plain_gelu(x: Tensor, bias: Tensor) -> Outputs:
    return (F.gelu(x + bias, approximate="tanh"),)


def _plain_merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> Outputs:
    weight = torch.sigmoid(lse1 - lse2).transpose(1, 2).unsqueeze(-1)
    return (weight * out1 + (1 - weight) * out2).to(out1.dtype), torch.logaddexp(lse1, lse2)


def _merge_shapes(c: OpCase) -> dict[str, tuple[int, ...]]:
    out, lse = (c.batch, c.seq_len, c.num_heads, c.head_dim), (c.batch, c.num_heads, c.seq_len)
    return {"out1": out, "lse1": lse, "out2": out, "lse2": lse}


def _merge_bytes(c: OpCase) -> tuple[float, float]:
    # Forward reads two lses and writes one; backward reads two and the gradient of one, and writes two.
    forward, backward = _times_bytes(3, 5)(c)
    lse = 4.0 * c.batch * c.num_heads * c.seq_len
    return forward + 3 * lse, backward + 5 * lse


def _plain_pack(c: OpCase) -> Callable[..., Outputs]:
    def pack(x: Tensor, bias: Tensor) -> Outputs:
        x = x + bias.view(x.shape[2:])
        return (x.unflatten(3, (c.sp_degree, -1)).permute(3, 0, 1, 2, 4, 5).contiguous(),)

    return pack


def _plain_unpack(packed: Tensor) -> Outputs:
    return (packed.permute(1, 2, 3, 0, 4, 5).contiguous().flatten(3, 4),)


OPS: dict[str, Op] = {
    "attention": Op(
        about="softmax(q k^T / sqrt(D)) v, non-causal, on separate q, k, v",
        shapes=_attention_shapes,
        plain=lambda c: plain_attention,
        work=_attention_flops,
        compute_bound=True,
        has_heads=True,
    ),
    "attention_packed": Op(
        about="the same on the projection's own [B, S, 3, H, D]; backward gives one gradient",
        shapes=lambda c: {"qkv": (c.batch, c.seq_len, 3, c.num_heads, c.head_dim)},
        plain=lambda c: _plain_packed,
        work=_attention_flops,
        compute_bound=True,
        has_heads=True,
    ),
    "adaln_modulate": Op(
        about="LayerNorm(x) (1 + scale) + shift",
        shapes=lambda c: {"x": _tokens(c), "shift": _rows(c), "scale": _rows(c)},
        plain=lambda c: _plain_adaln,
        work=_times_bytes(2, 3),
        row_dims=(1, None, None, 1),
    ),
    "gated_residual": Op(
        about="x + gate y",
        shapes=lambda c: {"x": _tokens(c), "y": _tokens(c), "gate": _rows(c)},
        plain=lambda c: _plain_gated,
        # The gradient of x is the incoming one: nothing moves for it.
        work=_times_bytes(3, 3),
        row_dims=(1, 1, None, 1),
    ),
    "gated_residual_adaln": Op(
        about="z = x + gate y and LayerNorm(z) (1 + scale) + shift, both kept",
        shapes=lambda c: {"x": _tokens(c), "y": _tokens(c), "gate": _rows(c), "shift": _rows(c), "scale": _rows(c)},
        plain=lambda c: _plain_gated_adaln,
        work=_times_bytes(4, 6),
        row_dims=(1, 1, None, None, None, 1, 1),
    ),
    "bias_gelu": Op(
        about="gelu_tanh(x + bias) at MLP width 4 C",
        shapes=lambda c: {"x": _tokens(c, MLP_RATIO), "bias": (MLP_RATIO * c.hidden_size,)},
        plain=lambda c: _plain_gelu,
        work=_times_bytes(2, 3, MLP_RATIO),
        row_dims=(1, None, 1),
    ),
    "merge_attention": Op(
        about="two partial attention outputs merged by their log-sum-exp",
        shapes=_merge_shapes,
        plain=lambda c: _plain_merge,
        work=_merge_bytes,
        row_dims=(1, 2, 1, 2, 1, 2),
        has_heads=True,
    ),
    "sp_pack_heads": Op(
        about="q, k, v plus the projection's bias, ordered by the rank that each head goes to",
        shapes=lambda c: {
            "x": (c.batch, c.seq_len, 3, c.num_heads, c.head_dim),
            "bias": (3 * c.hidden_size,),
        },
        plain=_plain_pack,
        work=_times_bytes(2, 2, 3),
        row_dims=(1, None, 2),
        has_heads=True,
    ),
    "sp_unpack_heads": Op(
        about="attention's output back from the ranks that held its heads",
        shapes=lambda c: {
            "packed": (c.sp_degree, c.batch, c.seq_len, 1, c.num_heads // c.sp_degree, c.head_dim),
        },
        plain=lambda c: _plain_unpack,
        work=_times_bytes(2, 2),
        row_dims=(2, 1),
        has_heads=True,
    ),
    "clone": Op(
        about="roofline of memory-bound ops: a copy, read and write counted",
        shapes=lambda c: {"x": _tokens(c)},
        plain=lambda c: lambda x: (x.clone(),),
        work=lambda c: (_times_bytes(2, 0)(c)[0], 0.0),
        row_dims=(1, 1),
        differentiable=False,
    ),
    "matmul": Op(
        about="roofline of compute-bound ops: [S, C] x [C, C] on random data",
        shapes=lambda c: {"a": (c.batch, c.seq_len, c.hidden_size), "b": (c.hidden_size, c.hidden_size)},
        plain=lambda c: lambda a, b: (a @ b,),
        work=lambda c: (2.0 * c.batch * c.seq_len * c.hidden_size**2, 0.0),
        row_dims=(1, None, 1),
        compute_bound=True,
        differentiable=False,
    ),
}
ROOFLINES = ("clone", "matmul")


def make_inputs(case: OpCase, device: torch.device, *, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs by name, requiring gradients where the op has a backward. Never zeros: those run faster."""
    generator = torch.Generator(device).manual_seed(seed)
    op = OPS[case.op]
    inputs = {}
    for name, shape in op.shapes(case).items():
        dtype = torch.float32 if name.startswith("lse") else DTYPES[case.dtype]
        inputs[name] = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        inputs[name].requires_grad_(op.differentiable)
    return inputs


def work_of(case: OpCase, direction: str) -> dict[str, Any]:
    """`flops` and `bytes_moved` of one call, one of them None."""
    op = OPS[case.op]
    forward, backward = op.work(case)
    work = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    return {"flops": work if op.compute_bound else None, "bytes_moved": None if op.compute_bound else work}
