"""Compile every Triton kernel without a GPU and table what it takes: `python bench/codegen.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from longreel.bench.codegen_report import compile_all, write_report
from longreel.bench.kernel_list import HEAD_DIMS, kernel_cases
from longreel.data.command_line import parse_arguments


@dataclass(frozen=True, kw_only=True, slots=True)
class CodegenConfig:
    """Which kernels to compile for which GPUs, and where to write codegen.md and codegen.json.

    Args:
        arch: compute capabilities, 90 for 9.0.
        head_dim: of the attention kernels.
        out: folder for the report.
    """

    arch: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (90,)
    head_dim: tuple[int, ...] = HEAD_DIMS
    out: Path = Path("out/codegen")

    def __post_init__(self) -> None:
        known = {80, 86, 89, 90, 100, 103, 120}
        if not self.arch or not set(self.arch) <= known:
            raise ValueError(f"arch is {self.arch}; it must be of {sorted(known)}")
        if not self.head_dim or not set(self.head_dim) <= set(HEAD_DIMS):
            raise ValueError(f"head_dim is {self.head_dim}; it must be of {HEAD_DIMS}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one `error:` line about a bad command."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        config = parse_arguments(CodegenConfig, words, prog="python bench/codegen.py")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import triton
    from rich.progress import track

    cases = kernel_cases(config.head_dim)
    rows = list(track(compile_all(cases, config.arch), "compiling", total=len(cases) * len(config.arch)))
    page, data = write_report(config.out, rows, {"triton": triton.__version__})
    print(f"{len(rows)} kernels. Tables: {page}\nData: {data}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
