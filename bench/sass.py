"""What a compiled kernel's machine code says: its matrix instructions, its inner loop and the cycles that takes.

Cycles are a multiprocessor's of Hopper, predicted, not measured: each unit at its full rate, latencies hidden.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

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
    value at a time, which the units of the exponentials are assumed to do; spills are accesses to local memory. mix
    counts all instructions by what they are for, in the order of MIX.
    """

    instructions: int
    exponentials: int
    products: dict[int, int]
    warp_products: int = 0
    conversions: int = 0
    spills: int = 0
    mix: dict[str, int] = field(default_factory=dict)

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


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPass:
    """What a warp of a memory-bound kernel executes for one tile.

    special counts instructions of the special function units (exponentials, reciprocals, conversions of single values);
    loads_first says that every load stands before the first exchange between threads and the first store.
    """

    instructions: int
    special: int
    loads_first: bool


# What an instruction is for, by how its name starts; the first that fits.
MIX = {
    "matrix": r"HGMMA|HMMA",
    "exponentials": r"MUFU",
    "conversions": r"F2F",
    "arithmetic": r"FADD|FMUL|FFMA|FMNMX|FSEL|FSETP|FSET|HADD|HMUL|HFMA|HMNMX",
    "copies": r"LDGSTS|LDGDEPBAR|LDG|STG|RED|ATOM|UTMA|LDS|STS|LDSM|STSM|LDC|ULDC",
    "synchronisation": r"BAR|SYNCS|WARPSYNC|DEPBAR|WARPGROUP|FENCE|MEMBAR|ELECT|BSYNC|BSSY",
    "other": r"",
}
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_PRODUCT = re.compile(r"\bHGMMA\.64x(\d+)x16\b")


def inner_loop(sass: str) -> Loop | None:
    """The shortest loop with matrix products and exponentials, None where there is none.

    The loop over full tiles, that is: the one over the last, masked tile is longer.
    """
    loops: list[Loop] = []
    for body in _loop_bodies(_code(sass)):
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
                    mix=_mix(body),
                )
            )
    return min(loops, key=lambda loop: loop.instructions) if loops else None


def row_pass(sass: str) -> RowPass:
    """The shortest loop that loads and stores; the whole program where there is none."""
    code = _code(sass)
    bodies = [
        body
        for body in _loop_bodies(code)
        if all(any(_name(text).startswith(access) for text in body) for access in ("LDG", "STG"))
    ]
    body = min(bodies, key=len) if bodies else [text for _, text in code]
    # After the last way out there are only padding and a branch to itself.
    names = [_name(text) for text in body]
    if not bodies:
        names = names[: max(i for i, name in enumerate(names) if name.startswith("EXIT")) + 1]
    waits = [i for i, name in enumerate(names) if name.startswith(("SHFL", "BAR", "STG"))]
    return RowPass(
        instructions=len(names),
        special=sum(name.startswith(("MUFU", "F2F.")) for name in names),
        loads_first=not any(name.startswith("LDG") for name in names[min(waits, default=len(names)) :]),
    )


def _code(sass: str) -> list[tuple[int, str]]:
    """Instructions with their addresses."""
    return [(int(m[1], 16), m[2]) for m in _INSTRUCTION.finditer(sass)]


def _loop_bodies(code: list[tuple[int, str]]) -> Iterator[list[str]]:
    """The instructions of every loop, from where a branch leads back to the branch."""
    for address, text in code:
        branch = re.search(r"\bBRA\S* (?:\S+, )?0x([0-9a-f]+)", text)
        if branch is not None and int(branch[1], 16) < address:
            yield [t for a, t in code if int(branch[1], 16) <= a <= address]


def _name(text: str) -> str:
    """Of an instruction, without the predicate that guards it."""
    return text.split(None, 1)[1] if text.startswith("@") else text


def _mix(body: list[str]) -> dict[str, int]:
    found = Counter(next(kind for kind, names in MIX.items() if re.match(names, _name(text))) for text in body)
    return {kind: found[kind] for kind in MIX}


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
