"""How long a step waits for communication that computation does not hide."""

from __future__ import annotations

from longreel.reports.records import Record

# Parts of a step that are communication wherever they occur; so is whatever a record has hidden seconds of.
COMMUNICATION = ("sequence", "sharding", "offload")


def exposed_seconds(record: Record) -> float | None:
    """Seconds of a step that wait for communication; None where the step's parts are not known."""
    if not record.breakdown or not record.step_s:
        return None
    names = {*COMMUNICATION, *record.hidden}
    return sum(seconds for name, seconds in record.breakdown.items() if name in names)


def exposed_share(record: Record) -> float | None:
    """The same as a part of the step, 0 to 1."""
    seconds = exposed_seconds(record)
    return None if seconds is None or not record.step_s else seconds / record.step_s
