"""Lists on a command line: lengths, counts, names."""

from __future__ import annotations

import re
from collections.abc import Sequence


def parse_lengths(option: str, text: str | None) -> tuple[int, ...] | None:
    """`1k,2048` -> (1024, 2048), ascending; ValueError for what is not a list of lengths; None stays None."""
    if text is None:
        return None
    return tuple(sorted({one_length(option, word) for word in text.split(",")}))


def one_length(option: str, word: str) -> int:
    """`2k` -> 2048; ValueError for what is no length."""
    match = re.fullmatch(r"\s*(\d+)\s*(k?)\s*", word, re.IGNORECASE | re.ASCII)
    tokens = int(match[1]) * (1024 if match[2] else 1) if match else 0
    if tokens < 1:
        raise ValueError(f"{option}: {word.strip()!r} is not a length in tokens; write 2048 or 2k, separated by commas")
    return tokens


def up_to(seq_lens: tuple[int, ...], longest: int) -> tuple[int, ...]:
    """Those that are no longer than `longest`, and on to it in powers of two."""
    lengths = [n for n in seq_lens if n <= longest]
    while lengths and lengths[-1] * 2 <= longest:
        lengths.append(lengths[-1] * 2)
    return tuple(lengths) or (longest,)


def parse_counts(option: str, text: str | None) -> tuple[int, ...] | None:
    """`4,2` -> (2, 4); ValueError for what is not a list of positive whole numbers; None stays None."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and int(word) > 0):
            raise ValueError(f"{option}: {word!r} is not a positive whole number; write 2,4, separated by commas")
    return tuple(sorted({int(word) for word in words}))


def parse_names(option: str, text: str | None, known: Sequence[str]) -> tuple[str, ...] | None:
    """`a,b` -> ("a", "b"), each once, as given, upper or lower case; ValueError for a name that is not known."""
    if text is None:
        return None
    names = tuple(dict.fromkeys(word.strip().lower() for word in text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: unknown {name!r}; there are {', '.join(known)}")
    return names
