"""Numbers and names in words, the same in the figures, the page and the terminal summary."""

from __future__ import annotations

import math
import re

ENGINE_LABELS = {
    "fsdp2-zero2": "ZeRO-2",
    "fsdp2-zero3": "ZeRO-3",
    "ddp": "DDP",
    "colossalai": "ColossalAI ZeRO-2",
}

REGIME_LABELS = {"full": "full self-attention", "text_only": "text attention only"}

# Record.memory_meaning in words.
MEMORY_LABELS = {"allocated": "memory", "step": "step memory", "process": "process memory"}

MISSING = "–"

BYTE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def number(value: float | None) -> str:
    """Three significant digits below 1,000, whole numbers with thousands separators above, a dash for None."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 999.5:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def length(tokens: int) -> str:
    """A sequence length as an axis label: 8K, 128K, 1M for powers of two, else 819,200."""
    if tokens >= 1024 and tokens & (tokens - 1) == 0:
        return f"{tokens >> 20}M" if tokens >= 2**20 else f"{tokens >> 10}K"
    return f"{tokens:,}"


def byte_unit(largest: float) -> tuple[int, str]:
    """(bytes, name) of the binary unit in which `largest` is at least 1."""
    for size, name in BYTE_UNITS:
        if largest >= size:
            return size, name
    return 1, "B"


def time_unit(largest: float) -> tuple[float, str]:
    """(seconds, name) of the unit in which `largest` is at least 1."""
    for size, name in TIME_UNITS:
        if largest >= size:
            return size, name
    return TIME_UNITS[-1]


def in_bytes(value: float | None) -> str:
    """Bytes with the unit that suits them, `80.0 GiB`."""
    if value is None:
        return MISSING
    size, name = byte_unit(value)
    return f"{number(value / size)} {name}"


def interval(bounds: tuple[float, float] | None, scale: float = 1.0) -> str:
    """`1.20–1.31` in units of `scale`, empty for None."""
    return "" if bounds is None else f"{number(bounds[0] / scale)}–{number(bounds[1] / scale)}"


def ratio(value: float | None) -> str:
    """`1.46×`, a dash for None."""
    return MISSING if value is None else f"{value:.2f}×"


def engine(name: str) -> str:
    """The sharding engine in the field's words, the name itself where there is no better one."""
    return ENGINE_LABELS.get(name, name)


def printable(text: str) -> str:
    """Text without control characters: XML cannot hold them, and on a terminal they would move the cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def one_line(text: str) -> str:
    """Text as one line of a terminal."""
    return printable(" ".join(text.splitlines()))


def slug(text: str) -> str:
    """Lower-case letters, digits and hyphens only: fit for file names and element ids."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80] or "none"
