"""The few instructions of PTX that the polynomial exponentials are made of, on tensors of fp32.

As PTX defines them: max drops a NaN and max.NaN does not, ex2 flushes what is subnormal, a NaN that arithmetic makes
has the bits 7fffffff, integers wrap.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _canonical(value: Tensor) -> Tensor:
    """Of a result in fp32, or wider to be rounded once, with PTX's one NaN."""
    bits = value.float().view(torch.int32)
    return torch.where(value.isnan(), 0x7FFFFFFF, bits).to(torch.int32).view(torch.float32)


def _exp2(a: Tensor) -> Tensor:
    result = torch.exp2(a.double()).float()
    return result.masked_fill(result < torch.finfo(torch.float32).tiny, 0.0)


_FLOAT: dict[str, Callable[..., Tensor]] = {
    "ex2.approx.ftz.f32": _exp2,
    "max.f32": torch.fmax,
    "max.NaN.f32": torch.maximum,
    "add.rn.f32": torch.add,
    "sub.rn.f32": torch.sub,
    "mul.rn.f32": torch.mul,
    "fma.rn.f32": lambda a, b, c: a.double() * b.double() + c.double(),
}
_BITS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, by: a << by,
    "add.s32": torch.add,
}


def run_ptx(text: str, values: list[Tensor]) -> list[Tensor]:
    """Results $0 .. $7 of one piece of assembly on arguments $8 .. $15, element by element."""
    registers = {f"${8 + i}": value.float() for i, value in enumerate(values)}
    shape = values[0].shape

    def read(name: str) -> Any:
        if name.isdigit():
            return int(name)
        if name.startswith("0f"):
            return torch.full(shape, struct.unpack(">f", bytes.fromhex(name[2:]))[0])
        return registers[name]

    for line in text.splitlines():
        if line in ("{", "}") or line.startswith(".reg"):
            continue
        name, target, *operands = line.rstrip(";").replace(",", "").split()
        given = [read(operand) for operand in operands]
        if name in _FLOAT:
            registers[target] = _canonical(_FLOAT[name](*given))
        else:
            words = [g.view(torch.int32) if isinstance(g, Tensor) else g for g in given]
            registers[target] = _BITS[name](*words).view(torch.float32)
    return [registers[f"${i}"] for i in range(8)]


def exp2_mixed(x: Tensor, poly: int) -> Tensor:
    """As triton_attention_exp.exp2_mixed, poly of every 8 columns as polynomials; a GPU's thread has others."""
    from longreel.kernels.triton_attention_exp import exp2_assembly

    if not poly:
        return torch.exp2(x)
    results = run_ptx(str(exp2_assembly(poly)), list(x.unflatten(-1, (-1, 8)).unbind(-1)))
    return torch.stack(results, -1).flatten(-2)
