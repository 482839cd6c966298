"""Command lines over configuration dataclasses: what tyro complains about becomes one line."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
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


def run_command(work: Callable[[Config], None], config_type: type[Config], args: Sequence[str]) -> int:
    """Parse a command line and work; what the user got wrong becomes one line.

    Args:
        work: called with the configuration. config_type: dataclass that the command line is made of.
        args: the command line without the program's name.

    Returns:
        Exit status: 0, 2 after a ValueError or an OSError, printed as `error: ...` on stderr, or 130 if interrupted.
    """
    try:
        work(parse_arguments(config_type, args))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


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
