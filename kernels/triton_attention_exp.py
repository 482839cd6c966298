"""2^x of a tile with a share of it on the FMA units: the special function unit gives 16 values a cycle, they give 128.

Source: FlashAttention-4 (Dao-AILab/flash-attention, 2025) for the idea; Cody and Waite 1980 for the splitting of x.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Values that one piece of assembly takes: the unit of POLY.
PACK = gl.constexpr(8)


@gluon.constexpr_function
def exp2_assembly(num_poly):
    """PTX for 8 exponentials $0 .. $7 of $8 .. $15, num_poly of them as polynomials.

    x + 1.5 * 2^23 + 127 rounds x to an integer, whose low bits are then the exponent field of 2^integer; the fraction
    goes through the polynomial, and the product of the two is the result. x is clamped to -127, whose exponent field is
    that of zero: zero comes out there, for -inf too. NaN passes the clamp, and then the product: a row with such a
    score is NaN as a whole.
    """
    import struct

    # Of 2^f on [-0.5, 0.5], from f^0 up: least largest relative error, 7.5e-5, that is 1/26 of bf16's rounding.
    coefficients = (0.9999280571937561, 0.6932609677314758, 0.2426111251115799, 0.0551716685295105)
    c0, c1, c2, c3, low, magic = (
        "0f" + struct.pack(">f", value).hex().upper() for value in (*coefficients, -127.0, 12582912.0 + 127.0)
    )
    lines = ["{", ".reg .f32 x, t, f;", ".reg .b32 i;"]
    for index in range(8):
        if index >= num_poly:
            lines.append(f"ex2.approx.ftz.f32 ${index}, ${8 + index};")
            continue
        lines += [
            f"max.NaN.f32 x, ${8 + index}, {low};",
            f"add.rn.f32 t, x, {magic};",
            f"sub.rn.f32 f, t, {magic};",
            "sub.rn.f32 f, x, f;",
            f"fma.rn.f32 x, f, {c3}, {c2};",
            f"fma.rn.f32 x, x, f, {c1};",
            f"fma.rn.f32 x, x, f, {c0};",
            "mov.b32 i, t;",
            "shl.b32 i, i, 23;",
            "mov.b32 t, i;",
            f"mul.rn.f32 ${index}, x, t;",
        ]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def exp2_constraints():
    """Eight results, eight arguments."""
    return ",".join(["=f"] * 8 + ["f"] * 8)


@gluon.jit
def exp2_mixed(x, POLY: gl.constexpr):
    """2^x in fp32 for x of at least PACK values per thread, POLY of every PACK as polynomials."""
    if POLY == 0:
        result = gl.exp2(x)
    else:
        result = gl.inline_asm_elementwise(
            exp2_assembly(POLY), exp2_constraints(), [x], dtype=gl.float32, is_pure=True, pack=PACK
        )
    return result
