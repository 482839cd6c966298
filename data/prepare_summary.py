"""What a preparation ends with: the index of all groups, and what was left out of it, in a file and for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console

from longreel.data.captions import CaptionProblem
from longreel.data.prepare_config import PrepareConfig
from longreel.data.prepare_group import Job, part_path
from longreel.data.shard_files import INDEX, SUMMARY, read_rows, write_json, write_rows
from longreel.data.sources import Sources

# Kinds of what was left out, as summary.json names them, and how a person would say it.
KINDS = {
    "bad_captions": "entries of the captions file that are wrong",
    "merged_captions": "entries of a file named before, joined with the first",
    "missing": "captioned files that are not there",
    "outside": "files that leave the folder",
    "uncaptioned": "videos without captions",
    "unreadable": "videos that cannot be read",
    "too_short": "stretches too short for a clip",
    "damaged": "clips with frames that cannot be decoded",
}
_SHOWN = 3


def finish(job: Job, sources: Sources, caption_problems: list[CaptionProblem]) -> dict[str, Any]:
    """Write index.parquet and summary.json from all groups' rows; any rank that sees them all writes the same bytes."""
    config = job.config
    rows: list[dict[str, Any]] = []
    problems: list[dict[str, Any]] = [
        {
            "kind": "merged_captions" if problem.merged else "bad_captions",
            "path": problem.where.removeprefix(f"{config.captions}: "),
            "reason": problem.reason,
        }
        for problem in caption_problems
    ]
    problems += [{"kind": "missing", "path": file, "reason": "no such file"} for file in sources.missing]
    problems += [
        {"kind": "outside", "path": file, "reason": reason.removeprefix(f"{config.videos / file}: ")}
        for file, reason in sources.outside
    ]
    problems += [
        {"kind": "uncaptioned", "path": file, "reason": "no usable caption names it"} for file in sources.uncaptioned
    ]
    for group in range(len(job.groups)):
        found, notes = read_rows(part_path(config.out, group))
        rows += found
        # A video in several pieces says the same thing once for each.
        problems += [problem for problem in notes["problems"] if problem not in problems[-64:]]
    write_rows(config.out / INDEX, rows, {"fingerprint": job.fingerprint})
    counts = Counter(problem["kind"] for problem in problems)
    summary = {
        "videos": len(job.videos),
        "videos_with_clips": len({row["path"] for row in rows}),
        "clips": len(rows),
        "frames": sum(row["frames"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "seconds_of_video": sum(row["frames"] / row["fps"] for row in rows if row["fps"]),
        "left_out": {kind: counts[kind] for kind in KINDS},
        "problems": problems,
    }
    write_json(config.out / SUMMARY, summary)
    return summary


def report(config: PrepareConfig, summary: dict[str, Any], console: Console) -> None:
    """Say what was made and what was left out; ValueError if no clip was."""
    console.print(
        f"{config.out}: {summary['clips']} clips of {summary['videos_with_clips']} of {summary['videos']} captioned "
        f"videos, {summary['frames']:,} frames, {summary['tokens']:,} tokens"
    )
    for kind, words in KINDS.items():
        if count := summary["left_out"][kind]:
            console.print(f"{count} {words}:")
            of_kind = [problem for problem in summary["problems"] if problem["kind"] == kind]
            for problem in of_kind[:_SHOWN]:
                console.print(f"  {problem['path']}: {problem['reason']}"[:200])
            if count > _SHOWN:
                console.print(f"  and {count - _SHOWN} more, see {config.out / SUMMARY}")
    if not summary["clips"]:
        raise ValueError(f"{config.videos}: no video gave a clip; {config.out / SUMMARY} says why for each")
