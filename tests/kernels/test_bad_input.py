"""Every argument of every public op of longreel.kernels, given wrongly: a TypeError or ValueError that names it.

The grid goes through what holds for every tensor, offset vector, number and count; what only one op asks for is beside
that op's other tests.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longreel import kernels

Arguments = dict[str, Any]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def offsets() -> Tensor:
    return torch.tensor([0, 2, 2, 5])


def modulated(*rows: str) -> Arguments:
    return {"x": randn(1, 5, 8), **{name: randn(3, 8) for name in rows}, "cu_seqlens": offsets()}


# Arguments that are right, by op; every optional one is given.
RIGHT: dict[str, Callable[[], Arguments]] = {
    "attention": lambda: {
        **{name: randn(1, 5, 2, 8) for name in "qkv"},
        "softmax_scale": 0.3,
        "cu_seqlens_q": offsets(),
        "cu_seqlens_k": offsets(),
    },
    "attention_packed": lambda: {"qkv": randn(1, 5, 3, 2, 8), "softmax_scale": 0.3, "cu_seqlens": offsets()},
    "adaln_modulate": lambda: {**modulated("shift", "scale"), "eps": 1e-6},
    "gated_residual": lambda: {**modulated("gate"), "y": randn(1, 5, 8)},
    "gated_residual_adaln": lambda: {**modulated("gate", "shift", "scale"), "y": randn(1, 5, 8), "eps": 1e-6},
    "bias_gelu": lambda: {"x": randn(2, 5, 8), "bias": randn(8)},
    "merge_attention": lambda: {
        **{name: randn(1, 5, 2, 8) for name in ("out1", "out2")},
        **{name: randn(1, 2, 5) for name in ("lse1", "lse2")},
    },
    "pack_heads": lambda: {"x": randn(2, 3, 3, 4, 8), "bias": randn(96), "num_ranks": 2},
    "unpack_heads": lambda: {"packed": randn(2, 2, 3, 3, 2, 8)},
    "pack_tokens": lambda: {"x": randn(2, 5, 3, 2, 8), "num_ranks": 2, "rows": 3},
    "unpack_tokens": lambda: {"packed": randn(2, 2, 3, 3, 2, 8), "tokens": 5},
}
OFFSETS = {"cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"}
NUMBERS = {"softmax_scale": -math.inf, "eps": 0.0}
COUNTS = {"num_ranks": 1, "rows": 0, "tokens": 0}
OPTIONAL = {"softmax_scale", "rows", "tokens", *OFFSETS}

# What is wrong with a tensor: how it is made from the right one, the error, and what the message says besides its name.
TENSOR_FAULTS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "list": (lambda t: t.tolist(), TypeError, "must be a tensor, got list"),
    "str": (lambda t: "x", TypeError, "must be a tensor, got str 'x'"),
    "int64": (lambda t: t.long(), ValueError, r"has dtype torch\.int64; it must be one of torch\.bfloat16"),
    "bool": (lambda t: t > 0, ValueError, r"has dtype torch\.bool"),
    "complex64": (lambda t: t.to(torch.complex64), ValueError, r"has dtype torch\.complex64"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), ValueError, r"has dtype torch\.float8_e4m3fn; it must be one of"),
    "sparse": (lambda t: t.to_sparse(), ValueError, r"has layout torch\.sparse_coo; it must be dense"),
    "no-dims": (lambda t: t.flatten()[0], ValueError, r"must (be|have) .*, got \[\]|\[\] must have"),
    "a-dim-more": (lambda t: t.unsqueeze(0).unsqueeze(0), ValueError, r"\[1, 1, .*"),
}
# The same of a second tensor, which must go with the first.
PARTNER_FAULTS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "other-dtype": (lambda t: t.double(), ValueError, r"(has dtype|in) torch\.float64"),
    "other-device": (lambda t: t.to("meta"), ValueError, "on meta"),
    "other-length": (lambda t: torch.cat((t, t), -1), ValueError, r"must (be|have|equal) "),
}
OFFSET_FAULTS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "list": (lambda t: t.tolist(), TypeError, r"must be an int32 or int64 tensor .* got list \[0, 2, 2, 5\]"),
    "float": (lambda t: t.float(), ValueError, r"must be an int32 or int64 vector .* torch\.float32"),
    "int16": (lambda t: t.short(), ValueError, r"must be an int32 or int64 vector .* torch\.int16"),
    "matrix": (lambda t: t.unsqueeze(0), ValueError, r"vector of N \+ 1 offsets, got torch\.int64 \[1, 4\]"),
    "one": (lambda t: t[:1], ValueError, r"vector of N \+ 1 offsets, got torch\.int64 \[1\]"),
    "none-at-all": (lambda t: t[:0], ValueError, r"vector of N \+ 1 offsets, got torch\.int64 \[0\]"),
    "other-device": (lambda t: t.to("meta"), ValueError, "is on meta, the tensor it splits on cpu"),
    "falls": (lambda t: torch.tensor([0, 3, 2, 5]), ValueError, r"never fall .* got \[0, 3, 2, 5\]"),
    "starts-late": (lambda t: torch.tensor([1, 2, 2, 5]), ValueError, r"start at 0, .* got \[1, 2, 2, 5\]"),
    "ends-early": (lambda t: torch.tensor([0, 2, 2, 4]), ValueError, r"end at the length 5, got \[0, 2, 2, 4\]"),
    "ends-late": (lambda t: torch.tensor([0, 2, 2, 6]), ValueError, r"end at the length 5, got \[0, 2, 2, 6\]"),
    "negative": (lambda t: torch.tensor([0, -1, 2, 5]), ValueError, r"never fall .* got \[0, -1, 2, 5\]"),
}
NUMBER_FAULTS: list[tuple[Any, type[Exception], str]] = [
    (math.nan, ValueError, "must be finite.*, got nan"),
    (math.inf, ValueError, "must be finite.*, got inf"),
    ("1", TypeError, "must be a number, got str '1'"),
    (True, TypeError, "must be a number, got bool True"),
    (torch.tensor(1.0), TypeError, "must be a number, got Tensor"),
]
COUNT_FAULTS: list[tuple[Any, type[Exception], str]] = [
    (-1, ValueError, "must be at least [01], got -1"),
    (2.0, TypeError, "must be an int, got float 2.0"),
    ("2", TypeError, "must be an int, got str '2'"),
    (True, TypeError, "must be an int, got bool True"),
]


def faults() -> list[Any]:
    """(op, argument, how to spoil it, error, message) for every argument of every op."""
    found: list[tuple[str, str, str, Callable[[Any], Any], type[Exception], str]] = []
    for op, make in RIGHT.items():
        tensors = [name for name, value in make().items() if isinstance(value, Tensor) and name not in OFFSETS]
        for name in make():
            if name in OFFSETS:
                listed = OFFSET_FAULTS
            elif name in tensors:
                listed = TENSOR_FAULTS | (PARTNER_FAULTS if name != tensors[0] else {})
            else:
                values = NUMBER_FAULTS if name in NUMBERS else COUNT_FAULTS
                if name == "eps":
                    values = [*values, (-1e-6, ValueError, "must be finite and at least 0, got -1e-06")]
                if name == "softmax_scale":
                    too_far = "must be at most 1e\\+18 either way, got "
                    values = [
                        *values,
                        (1e38, ValueError, too_far + "1e\\+38"),
                        (-3e38, ValueError, too_far + "-3e\\+38"),
                    ]
                listed = {repr(v): (lambda _, v=v: v, *rest) for v, *rest in values}
            if name not in OPTIONAL and (op, name) != ("pack_heads", "bias"):
                listed = listed | {"None": (lambda _: None, TypeError, "must be an? [a-z]+, got NoneType None")}
            if (op, name) == ("bias_gelu", "x"):
                # It takes any number of dims.
                listed = {fault: how for fault, how in listed.items() if fault != "a-dim-more"}
            found += [(op, name, fault, *how) for fault, how in listed.items()]
        unknown = (lambda _: "cuda", ValueError, "unknown .* provider 'cuda'; providers are auto, torch")
        found.append((op, "provider", "unknown", *unknown))
        found.append((op, "provider", "None", lambda _: None, ValueError, "unknown .* provider None"))
    return [pytest.param(op, name, *rest, id=f"{op}-{name}-{fault}") for op, name, fault, *rest in found]


def call(op: str, arguments: Arguments) -> Any:
    return getattr(kernels, op)(**{"provider": "torch"} | arguments)


@pytest.mark.parametrize("op", RIGHT)
def test_what_the_faults_are_made_from_is_right(op):
    call(op, RIGHT[op]())


@pytest.mark.parametrize(("op", "name", "spoil", "error", "says"), faults())
def test_a_wrong_argument_is_named(op, name, spoil, error, says):
    arguments = RIGHT[op]()
    arguments[name] = spoil(arguments.get(name))
    with pytest.raises(error, match=says) as raised:
        call(op, arguments)
    assert re.search(rf"\b{name}\b", str(raised.value))


def tensors_of(op: str) -> list[Any]:
    return [(op, name) for name, value in RIGHT[op]().items() if isinstance(value, Tensor) and name not in OFFSETS]


@pytest.mark.parametrize(("op", "name"), [pair for op in RIGHT for pair in tensors_of(op)])
def test_forward_mode_differentiation_is_refused(op, name):
    arguments = RIGHT[op]()
    value = arguments[name]

    def run(x: Tensor) -> Any:
        return call(op, arguments | {name: x})

    with pytest.raises(ValueError, match=f"{name} has a tangent of forward-mode differentiation, .* reverse mode only"):
        torch.func.jvp(run, (value,), (torch.ones_like(value),))
    # Within a dual level, what has no tangent passes.
    with torch.autograd.forward_ad.dual_level():
        run(value)


@pytest.mark.parametrize("op", ["adaln_modulate", "gated_residual", "gated_residual_adaln", "bias_gelu"])
def test_rows_without_channels_are_refused(op):
    arguments = {n: t[..., :0] if isinstance(t, Tensor) and n not in OFFSETS else t for n, t in RIGHT[op]().items()}
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., C\] with C at least 1, got \[\d, 5, 0\]"):
        call(op, arguments)


@pytest.mark.parametrize(
    ("op", "changes", "says"),
    [
        ("pack_heads", {"x": randn(2, 3, 3, 0, 8), "bias": randn(0)}, r"x must have heads, got \[2, 3, 3, 0, 8\]"),
        ("unpack_heads", {"packed": randn(0, 2, 3, 3, 2, 8)}, r"packed must hold at least one rank, got \[0, 2"),
        ("unpack_tokens", {"packed": randn(0, 2, 3, 3, 2, 8), "tokens": 0}, "packed must hold at least one rank"),
        ("attention", {n: randn(1, 5, 2, 0) for n in "qkv"}, "q has head_dim 0; it must be a multiple of 8"),
        ("attention_packed", {"qkv": randn(1, 5, 3, 2, 12)}, "qkv has head_dim 12; it must be a multiple of 8"),
        ("attention_packed", {"qkv": randn(1, 5, 3, 8, 2).transpose(3, 4)}, "qkv's last dim has stride 2; it must be"),
    ],
)
def test_sizes_that_no_op_takes(op, changes, says):
    with pytest.raises(ValueError, match=says):
        call(op, RIGHT[op]() | changes)


# Sides of size 0 that are no fault: nothing to do, and a result of that size.
EMPTY: dict[str, list[Arguments]] = {
    "attention": [
        {**{n: randn(0, 5, 2, 8) for n in "qkv"}, "cu_seqlens_q": None, "cu_seqlens_k": None},
        {**{n: randn(1, 5, 0, 8) for n in "qkv"}},
        {**{n: randn(1, 0, 2, 8) for n in "qkv"}, **{f"cu_seqlens_{s}": torch.tensor([0, 0]) for s in "qk"}},
    ],
    "attention_packed": [{"qkv": randn(0, 5, 3, 2, 8), "cu_seqlens": None}, {"qkv": randn(1, 5, 3, 0, 8)}],
    "adaln_modulate": [{"x": randn(0, 5, 8), "shift": randn(0, 8), "scale": randn(0, 8), "cu_seqlens": None}],
    "gated_residual": [{"x": randn(0, 5, 8), "y": randn(0, 5, 8), "gate": randn(0, 8), "cu_seqlens": None}],
    "gated_residual_adaln": [
        {"x": randn(0, 5, 8), "y": randn(0, 5, 8), **{n: randn(0, 8) for n in ("gate", "shift", "scale")}}
        | {"cu_seqlens": None}
    ],
    "bias_gelu": [{"x": randn(0, 8)}, {"x": randn(2, 0, 8)}, {"x": randn(8)}],
    "merge_attention": [
        {n: randn(0, 5, 2, 8) for n in ("out1", "out2")} | {n: randn(0, 2, 5) for n in ("lse1", "lse2")}
    ],
    "pack_heads": [{"x": randn(2, 0, 3, 4, 8)}, {"x": randn(0, 3, 3, 4, 8)}],
    "unpack_heads": [{"packed": randn(2, 2, 0, 3, 2, 8)}],
    "pack_tokens": [{"x": randn(2, 0, 3, 2, 8)}, {"x": randn(2, 0, 3, 2, 8), "rows": 0}],
    "unpack_tokens": [
        {"packed": randn(2, 2, 3, 3, 2, 8), "tokens": 0},
        {"packed": randn(2, 2, 0, 3, 2, 8), "tokens": 0},
    ],
}


# The last offset is wrong, the first, and one between.
WRONG_OFFSETS = [[0, 2, 2, 3], [0, 2, 2, 9], [1, 2, 2, 5], [0, 4, 2, 5]]


@pytest.mark.parametrize("op", [op for op, make in RIGHT.items() if OFFSETS & make().keys()])
def test_wrong_offsets_are_refused_in_compiled_code(op):
    arguments = RIGHT[op]()
    names = sorted(OFFSETS & arguments.keys())
    rest = {name: value for name, value in arguments.items() if name not in names}

    def run(*given: Tensor) -> Any:
        return call(op, rest | dict(zip(names, given, strict=True)))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    right = [offsets() for _ in names]
    got, want = compiled(*right), run(*right)
    for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (got, want)), strict=True):
        assert torch.equal(a, b)
    for index, name in enumerate(names):
        for bounds in WRONG_OFFSETS:
            given = [torch.tensor(bounds) if i == index else t for i, t in enumerate(right)]
            with pytest.raises(
                ValueError, match=re.escape(f"{name} must start at 0, never fall and end at the length 5, got {bounds}")
            ):
                compiled(*given)


def empty_by(op: str, provider: str) -> None:
    for changes in EMPTY[op]:
        arguments = RIGHT[op]() | changes
        leaves = [t.requires_grad_() for n, t in arguments.items() if isinstance(t, Tensor) and n not in OFFSETS]
        outs = call(op, arguments | {"provider": provider})
        outs = (outs,) if isinstance(outs, Tensor) else outs
        grads = torch.autograd.grad([out.sum() for out in outs], leaves, allow_unused=True)
        for leaf, grad in zip(leaves, grads, strict=True):
            assert grad is None or grad.shape == leaf.shape
            # Of what takes part in no result.
            assert grad is None or any(out.numel() for out in outs) or not grad.any()


@pytest.mark.parametrize(
    ("op", "provider"),
    [*itertools.product(EMPTY, ["torch"]), ("attention", "sdpa-flash"), ("attention_packed", "sdpa-flash")],
)
def test_empty_sides_give_empty_results(op, provider):
    empty_by(op, provider)


@pytest.mark.parametrize(("op", "provider"), [*itertools.product(EMPTY, ["triton"]), ("attention", "triton-atomic")])
def test_empty_sides_by_triton(run_interpreted, op, provider):
    run_interpreted(empty_by, op, provider)
