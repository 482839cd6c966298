"""The README's table of kernels, from op records: `python -m longreel.reports.op_table [FOLDER] [--write README.md]`.

Only what a GPU measured counts. Without such records the table is one line that says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from longreel.reports import formatting
from longreel.reports.op_records import OpRecord
from longreel.reports.op_summary import Duel, duels
from longreel.reports.store import load_lines

BEGIN, END = "<!-- kernels: made by python -m longreel.reports.op_table -->", "<!-- end of kernels -->"
FOLDER = Path("reports/measured")
NOTHING = (
    "No GPU has measured these kernels yet; every figure of theirs elsewhere is predicted or compiled, and says so."
)
# Attention is shown from this length on; of the other ops the longest one.
LEAST_TOKENS = 32_768
_HEAD = "| op | direction | tokens | width | ours | of roofline | against the best peer | error, of its bar |"


def markdown(records: Sequence[OpRecord]) -> list[str]:
    """The table's lines, a table per device with the commands that made its records; NOTHING without records."""
    measured = [r for r in records if r.kind == "measured" and not r.device.startswith("CPU")]
    devices = list(dict.fromkeys(r.device for r in measured if r.is_ours and r.rate))
    if not devices:
        return [NOTHING]
    lines: list[str] = []
    for device in devices:
        here = [r for r in measured if r.device == device]
        chosen = _chosen(duels(here))
        commands = dict.fromkeys(str(d.ours.provenance.get("command", "unknown")) for d in chosen)
        commits = dict.fromkeys(str(d.ours.provenance.get("commit", "unknown"))[:12] for d in chosen)
        made = f"commit {', '.join(commits)}, `{'`, `'.join(commands)}`"
        lines += ["", f"Measured on one {device} ({made}):", "", _HEAD, "|" + " --- |" * 8]
        lines += [_row(duel) for duel in chosen]
    return lines[1:]


def _chosen(found: Sequence[Duel]) -> list[Duel]:
    """One duel of a point, the last one measured; see LEAST_TOKENS."""
    last: dict[tuple[object, ...], Duel] = {}
    for duel in sorted(found, key=lambda d: d.ours.run):
        r = duel.ours
        last[r.op, r.direction, r.dtype, tuple(sorted(r.shape.items()))] = duel
    longest: dict[str, int] = {}
    for duel in last.values():
        longest[duel.ours.op] = max(longest.get(duel.ours.op, 0), duel.ours.shape["seq_len"])

    def is_shown(r: OpRecord) -> bool:
        return r.shape["seq_len"] >= LEAST_TOKENS if r.op == "attention" else r.shape["seq_len"] == longest[r.op]

    place = {id(duel): i for i, duel in enumerate(found)}
    return sorted((d for d in last.values() if is_shown(d.ours)), key=lambda d: place[id(d)])


def _row(duel: Duel) -> str:
    r, peer = duel.ours, duel.peer
    unit = "TFLOP/s" if r.is_compute_bound else "TB/s"
    width = (
        f"{r.shape['num_heads']} x {r.shape['head_dim']}" if "head_dim" in r.shape else f"{r.shape['hidden_size']:,}"
    )
    against = "no peer ran" if peer is None else f"{formatting.ratio(duel.speedup)} {peer.provider}"
    if peer is not None and r.comparison.get("provider") == peer.provider:
        against += f" ({r.comparison['verdict']})"
    used = max((error / r.allowed[name] for name, error in r.error.items() if r.allowed.get(name)), default=None)
    cells = (
        r.op.replace("_", " "),
        r.direction,
        f"{r.shape['seq_len']:,}",
        width,
        f"{formatting.number((r.rate or 0.0) / 1e12)} {unit} ({r.provider})",
        formatting.MISSING if duel.roofline_fraction is None else f"{100 * duel.roofline_fraction:.0f} %",
        against,
        formatting.MISSING if used is None else f"{100 * used:.0f} %",
    )
    return f"| {' | '.join(cells)} |"


def replaced(text: str, lines: Sequence[str]) -> str:
    """A document with these lines between its marks; ValueError where the marks are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document needs the lines {BEGIN!r} and {END!r}, where the table goes between")
    return "\n".join([before + begin, *lines, end + after])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or write it into a document; the exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="longreel.reports.op_table", description="The table of kernels, in Markdown.")
    parser.add_argument(
        "source", type=Path, nargs="?", default=FOLDER, metavar="FILE_OR_FOLDER", help=f"op records (default: {FOLDER})"
    )
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="put it between the marks of this file")
    options = parser.parse_args(arguments)
    source: Path = options.source
    try:
        lines = markdown([r for file in _files(source) for r in load_lines(file, OpRecord.from_json)])
        if options.write is None:
            print("\n".join(lines))
        else:
            options.write.write_text(replaced(options.write.read_text(encoding="utf-8"), lines), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"longreel.reports.op_table: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    return 0


def _files(source: Path) -> list[Path]:
    """Record files of ops; a folder that is not there yet holds none."""
    if source.is_file():
        return [source]
    if not source.exists() and source != FOLDER:
        raise ValueError(f"no such file or folder: {source}")
    # A folder may hold records of training steps too, of another kind.
    return [file for file in sorted(source.rglob("*.jsonl")) if _holds_ops(file)]


def _holds_ops(file: Path) -> bool:
    with open(file, encoding="utf-8") as lines:
        return '"op":' in lines.readline()


if __name__ == "__main__":
    sys.exit(main())
