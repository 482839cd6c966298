"""Command lines over configuration dataclasses: what tyro complains about becomes one line."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

Config = TypeVar("Config")


def parse_arguments(config_type: type[Config], args: Sequence[str], *, prog: str | None = None) -> Config:
    """The configuration that a command line asks for.

    Args:
        config_type: dataclass that the command line is made of.
        args: the command line without the program's name. prog: that name, for --help.

    Raises:
        ValueError: the command line is bad; the message is tyro's, without its frame.
    """
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            return tyro.cli(config_type, args=list(args), prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_unframed(framed.getvalue())} (see --help)") from None


def _unframed(text: str) -> str:
    """The message in tyro's box: what follows the first rule (or the edge that holds the title), up to the next."""
    sections: list[list[str]] = [[]]
    for line in text.splitlines():
        # Where the output cannot show box characters tyro draws with ASCII.
        if re.search("─{4}|-{9}", line):
            sections.append([])
        else:
            sections[-1].append(line.strip("│ "))
    message = " ".join(" ".join(sections[1 if len(sections) > 1 else 0]).split())
    return message.partition(" Got errors:")[0]
