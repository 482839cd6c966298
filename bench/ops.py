"""The ops of a DiT block as benchmark cases: inputs, the work they must do, and their definition (plain_ops).

Beside the ops stand two rooflines, `clone` and `matmul`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longreel.bench import plain_ops as plain
from longreel.bench.plain_ops import Outputs

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Ranks that the layout changes around all-to-all split the heads over, where these divide.
SP_DEGREE = 8
MLP_RATIO = 4
# Keys and values of cross attention: a caption's tokens.
TEXT_TOKENS = 300


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
        if OPS[self.op].packs and self.batch != 1:
            raise ValueError(f"{self.op} is about one packed sequence: batch must be 1, got {self.batch}")

    @property
    def hidden_size(self) -> int:
        """C, the width of a token."""
        return self.num_heads * self.head_dim

    @property
    def kv_len(self) -> int:
        """Keys of attention: its own tokens, or a caption's."""
        return TEXT_TOKENS if self.op == "attention_text" else self.seq_len

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
            sizes |= {"num_heads": self.num_heads, "head_dim": self.head_dim}
            return sizes if self.kv_len == self.seq_len else sizes | {"kv_len": self.kv_len}
        return sizes | {"hidden_size": self.hidden_size}

    def label(self) -> str:
        """In one word, as test ids are read: attention-bf16-B1-S4096-H2-D72."""
        letters = {"batch": "B", "seq_len": "S", "kv_len": "T", "num_heads": "H", "head_dim": "D", "hidden_size": "C"}
        return "-".join([self.op, self.dtype, *(f"{letters[name]}{size}" for name, size in self.shape().items())])


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """What an op is, apart from who computes it.

    Args:
        about: formula, in words.
        shapes: case -> shape of every input, by name. An input named lse* is fp32.
        plain: inputs in that order -> outputs; for a case.
        work: case -> (forward, backward) useful FLOPs if compute_bound, else fewest bytes.
        row_dims: dim of each input, then of each output, along which units are independent of each other; None for
            an input that all units share, whose gradient is a sum over them. Empty for attention.
        units: case -> how many independent units there are: tokens, unless the op says otherwise.
        unit: tokens of a unit, where a tensor has fewer units than tokens along its dim.
        least_batch: samples below which the op moves nothing, and there is nothing to measure.
        has_heads: shapes have num_heads and head_dim, not hidden_size.
        differentiable: there is a backward to time.
        packs: it is about one packed sequence: batch 1 only.
    """

    about: str
    shapes: Callable[[OpCase], dict[str, tuple[int, ...]]]
    plain: Callable[[OpCase], Callable[..., Outputs]]
    work: Callable[[OpCase], tuple[float, float]]
    row_dims: tuple[int | None, ...] = ()
    units: Callable[[OpCase], int] = lambda c: c.seq_len
    unit: int = 1
    least_batch: int = 1
    compute_bound: bool = False
    has_heads: bool = False
    differentiable: bool = True
    packs: bool = False


def _attention_shapes(c: OpCase) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys("qkv", (c.batch, c.seq_len, c.num_heads, c.head_dim))


def _cross_shapes(c: OpCase) -> dict[str, tuple[int, ...]]:
    text = c.batch, TEXT_TOKENS, c.num_heads, c.head_dim
    return {"q": (c.batch, c.seq_len, c.num_heads, c.head_dim), "k": text, "v": text}


def scores_of(case: OpCase) -> int:
    """Pairs of a query and a key of an attention op, over batch and heads."""
    pairs = case.seq_len * case.kv_len
    if case.op == "attention_clips":
        pairs = sum((end - start) ** 2 for start, end in plain.clips(case.seq_len))
    return case.batch * case.num_heads * pairs


def _attention_flops(c: OpCase) -> tuple[float, float]:
    # Two matrix products forward, five backward; head_dim counts as it is.
    product = 2.0 * scores_of(c) * c.head_dim
    return 2 * product, 5 * product


def _tokens(c: OpCase, ratio: int = 1) -> tuple[int, int, int]:
    return c.batch, c.seq_len, ratio * c.hidden_size


def _rows(c: OpCase) -> tuple[int, int]:
    return c.batch, c.hidden_size


def _frames(c: OpCase) -> tuple[int, int]:
    return plain.num_frames(c.seq_len), c.hidden_size


def _times_bytes(forward: int, backward: int, ratio: float = 1) -> Callable[[OpCase], tuple[float, float]]:
    """Work of an op that moves its [B, S, ratio C] tensors this many times; vectors of size C do not count."""

    def work(c: OpCase) -> tuple[float, float]:
        size = ratio * math.prod(_tokens(c)) * c.element_size
        return forward * size, backward * size

    return work


def _layout_bytes(parts: int) -> Callable[[OpCase], tuple[float, float]]:
    """A read and a write of all tokens of one rank's heads; padding does not count."""

    def work(c: OpCase) -> tuple[float, float]:
        return _times_bytes(2, 2, parts / c.sp_degree)(c)

    return work


def _merge_shapes(c: OpCase) -> dict[str, tuple[int, ...]]:
    out, lse = (c.batch, c.seq_len, c.num_heads, c.head_dim), (c.batch, c.num_heads, c.seq_len)
    return {"out1": out, "lse1": lse, "out2": out, "lse2": lse}


def _merge_bytes(c: OpCase) -> tuple[float, float]:
    # Forward reads two lses and writes one; backward reads two and the gradient of one, and writes two.
    forward, backward = _times_bytes(3, 5)(c)
    lse = 4.0 * c.batch * c.num_heads * c.seq_len
    return forward + 3 * lse, backward + 5 * lse


OPS: dict[str, Op] = {
    "attention": Op(
        about="softmax(q k^T / sqrt(D)) v, non-causal, on separate q, k, v",
        shapes=_attention_shapes,
        plain=lambda c: plain.attention,
        work=_attention_flops,
        compute_bound=True,
        has_heads=True,
    ),
    "attention_packed": Op(
        about="the same on the projection's own [B, S, 3, H, D]; backward gives one gradient",
        shapes=lambda c: {"qkv": (c.batch, c.seq_len, 3, c.num_heads, c.head_dim)},
        plain=lambda c: plain.attention_packed,
        work=_attention_flops,
        compute_bound=True,
        has_heads=True,
    ),
    "attention_clips": Op(
        about="the same within each of four packed clips of uneven lengths (cu_seqlens); B = 1",
        shapes=lambda c: dict.fromkeys("qkv", (c.batch, c.seq_len, c.num_heads, c.head_dim)),
        plain=lambda c: plain.by_clip(plain.attention),
        work=_attention_flops,
        compute_bound=True,
        has_heads=True,
        packs=True,
    ),
    "attention_text": Op(
        about=f"cross attention: as many queries as tokens, {TEXT_TOKENS} keys and values of a caption",
        shapes=_cross_shapes,
        plain=lambda c: plain.attention,
        work=_attention_flops,
        compute_bound=True,
        has_heads=True,
    ),
    "adaln_modulate": Op(
        about="LayerNorm(x) (1 + scale) + shift",
        shapes=lambda c: {"x": _tokens(c), "shift": _rows(c), "scale": _rows(c)},
        plain=lambda c: plain.adaln,
        work=_times_bytes(2, 3),
        row_dims=(1, None, None, 1),
    ),
    "gated_residual": Op(
        about="x + gate y",
        shapes=lambda c: {"x": _tokens(c), "y": _tokens(c), "gate": _rows(c)},
        plain=lambda c: plain.gated,
        # The gradient of x is the incoming one: nothing moves for it.
        work=_times_bytes(3, 3),
        row_dims=(1, 1, None, 1),
    ),
    "gated_residual_adaln": Op(
        about="z = x + gate y and LayerNorm(z) (1 + scale) + shift, both kept",
        shapes=lambda c: {"x": _tokens(c), "y": _tokens(c), "gate": _rows(c), "shift": _rows(c), "scale": _rows(c)},
        plain=lambda c: plain.gated_adaln,
        work=_times_bytes(4, 6),
        row_dims=(1, 1, None, None, None, 1, 1),
    ),
    "adaln_frames": Op(
        about=f"adaln_modulate with a row of shift and scale per frame of {plain.FRAME_TOKENS} tokens (cu_seqlens)",
        shapes=lambda c: {"x": _tokens(c), "shift": _frames(c), "scale": _frames(c)},
        plain=lambda c: plain.adaln_frames,
        work=_times_bytes(2, 3),
        row_dims=(1, 0, 0, 1),
        units=lambda c: plain.num_frames(c.seq_len),
        unit=plain.FRAME_TOKENS,
        packs=True,
    ),
    "gated_adaln_frames": Op(
        about="gated_residual_adaln with a row of gate, shift and scale per frame",
        shapes=lambda c: dict.fromkeys("xy", _tokens(c)) | dict.fromkeys(("gate", "shift", "scale"), _frames(c)),
        plain=lambda c: plain.gated_adaln_frames,
        work=_times_bytes(4, 6),
        row_dims=(1, 1, 0, 0, 0, 1, 1),
        units=lambda c: plain.num_frames(c.seq_len),
        unit=plain.FRAME_TOKENS,
        packs=True,
    ),
    "bias_gelu": Op(
        about="gelu_tanh(x + bias) at MLP width 4 C",
        shapes=lambda c: {"x": _tokens(c, MLP_RATIO), "bias": (MLP_RATIO * c.hidden_size,)},
        plain=lambda c: plain.bias_gelu,
        work=_times_bytes(2, 3, MLP_RATIO),
        row_dims=(1, None, 1),
    ),
    "merge_attention": Op(
        about="two partial attention outputs merged by their log-sum-exp",
        shapes=_merge_shapes,
        plain=lambda c: plain.merge,
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
        plain=lambda c: plain.pack_heads(c.sp_degree),
        work=_times_bytes(2, 2, 3),
        row_dims=(1, None, 2),
        has_heads=True,
    ),
    "sp_unpack_heads": Op(
        about="attention's output back from the ranks that held its heads",
        shapes=lambda c: {
            "packed": (c.sp_degree, c.batch, c.seq_len, 1, c.num_heads // c.sp_degree, c.head_dim),
        },
        plain=lambda c: plain.unpack_heads,
        work=_times_bytes(2, 2),
        row_dims=(2, 1),
        has_heads=True,
    ),
    "sp_pack_tokens": Op(
        about="attention's output on one rank's heads, ordered by the rank that each token goes to, padded",
        shapes=lambda c: {"x": (c.batch, c.seq_len, 1, c.num_heads // c.sp_degree, c.head_dim)},
        plain=lambda c: plain.pack_tokens(c.sp_degree),
        work=_layout_bytes(1),
        # A token's place among ranks and rows is no slice of one dim: head_dim is cut.
        row_dims=(4, 5),
        units=lambda c: c.head_dim,
        has_heads=True,
        least_batch=2,
    ),
    "sp_unpack_tokens": Op(
        about="q, k, v of one rank's heads from the ranks that held their tokens, the padding left out",
        shapes=lambda c: {
            "packed": (
                c.sp_degree,
                c.batch,
                -(-c.seq_len // c.sp_degree),
                3,
                c.num_heads // c.sp_degree,
                c.head_dim,
            ),
        },
        plain=lambda c: plain.unpack_tokens(c.seq_len),
        work=_layout_bytes(3),
        row_dims=(5, 4),
        units=lambda c: c.head_dim,
        has_heads=True,
        least_batch=2,
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
ATTENTION_OPS = tuple(name for name, op in OPS.items() if op.has_heads and op.compute_bound)


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
