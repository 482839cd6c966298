"""The report that the repository keeps: records of several sweeps, packed, and their page, small enough to commit.

python -m longreel.reports.publish out/published/h800 out/published/blog
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Sequence
from pathlib import Path

from longreel.reports import parts
from longreel.reports.crossover import crossover_part, load_cells
from longreel.reports.html import render
from longreel.reports.sources import load_ops, load_steps
from longreel.reports.store import latest, warnings_as_lines, write_files

FOLDER = Path("reports") / "published"
RECORDS, PAGE = "records.jsonl.gz", "report.html"
# Of both files together.
MAX_BYTES = 1_000_000


def publish(
    sources: Sequence[Path],
    out: Path,
    *,
    title: str,
    codegen: Path | None = None,
    kernels: Path | None = None,
    crossover: Path | None = None,
) -> tuple[Path, Path]:
    """Write the records of files and folders to one packed file, and their page beside it, both or neither.

    Args:
        sources: record files, or folders of them. out: the folder. title: of the page.
        codegen: a document that becomes a section. kernels: records of single ops, too.
        crossover: cells of bench/crossover.py, the same.

    Returns:
        The paths of both files.

    Raises:
        ValueError: a source has no records, or both files together are larger than MAX_BYTES.
        OSError: something cannot be read or written.
    """
    records = latest([record for source in sources for record in load_steps(source)[0]])
    sections = [] if kernels is None else [parts.kernels_part(load_ops(kernels)[0])]
    if crossover is not None:
        sections.append(crossover_part(load_cells(crossover)))
    if codegen is not None:
        text = codegen.read_text(encoding="utf-8")
        sections.append(parts.document_part(text, id="codegen", name="Generated code"))
    lines = "".join(f"{record.to_json()}\n" for record in records)
    packed = gzip.compress(lines.encode(), mtime=0)
    page = render(records, title=title, source_files=[RECORDS], parts=sections).encode()
    if len(packed) + len(page) > MAX_BYTES:
        raise ValueError(
            f"{len(records)} records make {len(packed) + len(page):,} bytes, packed and as a page; at most "
            f"{MAX_BYTES:,} are kept: publish fewer points"
        )
    write_files({out / RECORDS: packed, out / PAGE: page})
    return out / RECORDS, out / PAGE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, or 2 after one line on stderr that says what is wrong."""
    parser = argparse.ArgumentParser(prog="longreel.reports.publish", description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="a record file, or a folder of them")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help=f"default: {FOLDER}")
    parser.add_argument("--title", default="Longreel: published records", help="title of the page")
    parser.add_argument("--codegen", type=Path, metavar="FILE.md", help="what the kernels compile to, as a section")
    parser.add_argument(
        "--crossover", type=Path, metavar="FILE.json", help="the map of bench/crossover.py, as a section"
    )
    parser.add_argument("--kernels", type=Path, metavar="PATH", help="records of single ops, as a section")
    options = parser.parse_args(arguments)
    try:
        with warnings_as_lines("longreel.reports.publish: "):
            files = publish(
                options.sources,
                options.out,
                title=options.title,
                codegen=options.codegen,
                kernels=options.kernels,
                crossover=options.crossover,
            )
    except (ValueError, OSError) as error:
        print(f"longreel.reports.publish: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    for path in files:
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
