"""What tuning tried: every candidate against the constants in use, one row each."""

from __future__ import annotations

import json
from collections.abc import Sequence

from longreel.reports import formatting
from longreel.reports.op_records import OpRecord

HEADINGS = ("Kernel", "Width", "Lengths", "Timed as", "Candidate", "Time, ms", "Over that in use", "Verdict")
_SEARCH, _DECISION = "tune", "tuned"


def is_tuning(record: OpRecord) -> bool:
    """Whether the record is of a candidate, not of a provider as it is."""
    return str(record.config.get("label", "")).split(" ")[0] in (_SEARCH, _DECISION)


def tuning_rows(records: Sequence[OpRecord]) -> list[tuple[str, ...]]:
    """A row of words per candidate, in the order of HEADINGS: of each kernel those of the search, then the decision."""
    return [_words(r) for r in records if is_tuning(r)]


def _words(r: OpRecord) -> tuple[str, ...]:
    step, kernel, width, lengths = str(r.config["label"]).split(" ")
    ratio = r.comparison.get("ratio")
    verdict = str(r.comparison["verdict"]) if r.status == "ok" else f"{r.status}: {r.reason}"
    return (
        kernel,
        "every" if width == "0" else width,
        lengths,
        f"{r.op.replace('_', ' ')} {r.direction}" + (", again" if step == _DECISION else ""),
        _candidate(r),
        formatting.number(None if r.median_s is None else 1e3 * r.median_s),
        formatting.MISSING if ratio is None else f"{ratio:.3f} ({r.comparison['low']:.3f}–{r.comparison['high']:.3f})",
        verdict,
    )


def _candidate(r: OpRecord) -> str:
    """The candidate's own constants: the last row of the tiles it ran with. Plans change no launch."""
    constants = json.loads(r.config["tiles"][-1][3])
    return ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in constants.items()
        if name not in ("evidence", "record", "planned_programs") and value is not None
    )
