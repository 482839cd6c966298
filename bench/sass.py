"""What a compiled kernel's machine code says: its matrix instructions, its inner loop and the cycles that takes.

Cycles are a multiprocessor's of Hopper, predicted, not measured: each unit at its full rate, latencies hidden.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

# Cycles of one HGMMA 64 x n x 16 in half precision: 2048 multiply-adds each. Below n = 32 it is assumed to take 16,
# what the operand from registers needs.
_TENSOR_CYCLES_PER_COLUMN = 0.5
_LEAST_TENSOR_CYCLES = 16.0
# Cycles of one HMMA 16 x 8 x 16 of each of a warpgroup's four warps: 4 at full rate, of which mma.sync is assumed to
# reach 62 %.
_WARP_TENSOR_CYCLES = 6.5
# Exponentials per cycle.
_MUFU_PER_CYCLE = 16
# Values that a special function instruction of one warpgroup computes.
_GROUP_THREADS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """The inner loop of a warpgroup: instructions, exponentials per thread, and matrix instructions.

    products counts HGMMA by their columns, warp_products HMMA, which a warp computes alone; conversions are F2F, one
    value at a time, which the units of the exponentials are assumed to do; spills are accesses to local memory.
    """

    instructions: int
    exponentials: int
    products: dict[int, int]
    warp_products: int = 0
    conversions: int = 0
    spills: int = 0

    @property
    def tensor_cycles(self) -> float:
        """Of one pass, were the tensor cores this warpgroup's alone."""
        own = self.warp_products * _WARP_TENSOR_CYCLES
        return own + sum(
            count * max(_LEAST_TENSOR_CYCLES, columns * _TENSOR_CYCLES_PER_COLUMN)
            for columns, count in self.products.items()
        )

    @property
    def exponential_cycles(self) -> float:
        """Of one pass, on the special function units."""
        return (self.exponentials + self.conversions) * _GROUP_THREADS / _MUFU_PER_CYCLE

    @property
    def issue_cycles(self) -> float:
        """Of one pass: each of the four schedulers issues one instruction a cycle, and has one warp of the group."""
        return float(self.instructions)

    @property
    def computed_flops(self) -> float:
        """Of one pass, padding included."""
        own = 4 * 2.0 * 16 * 8 * 16 * self.warp_products
        return own + sum(2.0 * 64 * 16 * columns * count for columns, count in self.products.items())


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_PRODUCT = re.compile(r"\bHGMMA\.64x(\d+)x16\b")


def inner_loop(sass: str) -> Loop | None:
    """The shortest loop with matrix products and exponentials, None where there is none.

    The loop over full tiles, that is: the one over the last, masked tile is longer.
    """
    code = [(int(m[1], 16), m[2]) for m in _INSTRUCTION.finditer(sass)]
    loops: list[Loop] = []
    for address, text in code:
        branch = re.search(r"\bBRA\S* (?:\S+, )?0x([0-9a-f]+)", text)
        if branch is None or int(branch[1], 16) >= address:
            continue
        body = [t for a, t in code if int(branch[1], 16) <= a <= address]
        products = Counter(int(m[1]) for t in body if (m := _PRODUCT.search(t)))
        exponentials = sum("MUFU.EX2" in t for t in body)
        if products and exponentials:
            alone = sum("HMMA.16816" in t for t in body)
            loops.append(
                Loop(
                    instructions=len(body),
                    exponentials=exponentials,
                    products=dict(products),
                    warp_products=alone,
                    conversions=sum("F2F." in t for t in body),
                    spills=sum("LDL" in t or "STL" in t for t in body),
                )
            )
    return min(loops, key=lambda loop: loop.instructions) if loops else None


def product_shapes(ptx: str) -> list[str]:
    """Shapes of the asynchronous matrix instructions, widest first."""
    found = {int(n) for n in re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16", ptx)}
    return [f"m64n{n}k16" for n in sorted(found, reverse=True)]


def load_widths(ptx: str) -> dict[str, int]:
    """How many loads of global memory there are, by bytes per thread; `TMA` counts tensor copies."""
    widths: Counter[str] = Counter()
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)", ptx):
        widths[str(int(size, 0))] += 1
    for count, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\s", ptx):
        widths[str(int(count or 1) * int(bits) // 8)] += 1
    tensor = len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx))
    return dict(sorted(widths.items(), key=lambda item: -int(item[0]))) | ({"TMA": tensor} if tensor else {})
