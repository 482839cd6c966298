"""The folder that a sweep writes: one sweep at a time, every point once, records whole whatever happens."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longreel.data.folder_lock import only_writer
from longreel.reports import store
from longreel.reports.records import Record

RECORDS = "records.jsonl"
LOCK = ".sweep.lock"
# Of these there is no figure to keep: a worker may live next time, a package be installed.
_AGAIN = ("error", "skipped")


class Records:
    """The record file of a folder, and what it holds of this code on this machine.

    Args:
        folder: of the file. origin: provenance of what is added.
        resume: points that are there need no run, but for those that may go another way today: failed and skipped ones.
    """

    def __init__(self, folder: Path, origin: dict[str, Any], *, resume: bool) -> None:
        self.path = folder / RECORDS
        self.origin = origin
        self._answered: dict[str, Record] = {}
        # Points of this run, by the keys that records have, and what was there of points that run again.
        self._of_sweep: set[str] = set()
        self._again: dict[str, Record] = {}
        if resume and self.path.exists():
            for record in {r.key: r for r in of_origin(store.load(self.path), origin)}.values():
                if record.status in _AGAIN:
                    self._again[record.key] = record
                else:
                    self._keep(record)
        self.num_saved = len({record.key for record in self._answered.values()})

    def _keep(self, record: Record) -> None:
        self._answered[record.key] = record
        asked = record.provenance.get("asked")
        # A point of policy `auto` is answered by a record of the policy chosen.
        if isinstance(asked, dict):
            self._answered[str(asked.get("key"))] = record

    def of_sweep(self) -> list[Record]:
        """The records of this sweep's points: those it added, and those there before that it asked for."""
        return [self._answered[key] for key in self._of_sweep]

    def done(self, key: str) -> bool:
        """Whether a point with this key needs no run."""
        if key not in self._answered:
            return False
        self._of_sweep.add(self._answered[key].key)
        return True

    def saved(self, key: str) -> Record | None:
        """The record of a key, None where there is none."""
        return self._answered.get(key)

    def add(self, record: Record) -> bool:
        """Keep a record unless there is one of its key with as many steps; whether it is kept.

        It is appended to the file, unless it says again that and why a point was skipped. OSError names the file.
        """
        there = self._answered.get(record.key)
        if there is not None and len(record.samples_s) <= len(there.samples_s):
            return False
        before = self._again.get(record.key)
        try:
            if before is None or (before.status, before.reason, record.status) != ("skipped", record.reason, "skipped"):
                store.append(self.path, record)
        except OSError as error:
            raise OSError(
                f"{self.path}: {error.strerror or error}; the records before it are whole; make room and run the same "
                "command with --resume"
            ) from None
        self._keep(record)
        self._of_sweep.add(record.key)
        return True

    def all(self) -> list[Record]:
        """Every record of the file that has this origin."""
        return of_origin(store.load(self.path), self.origin) if self.path.exists() else []


def of_origin(records: Sequence[Record], origin: dict[str, Any]) -> list[Record]:
    """The records of this code on this machine: a folder may hold older ones, which a figure must not mix in."""
    same = ("commit", "environment")
    return [r for r in records if all(r.provenance.get(name) == origin[name] for name in same)]


def prepare_folder(folder: Path) -> None:
    """Make sure that files can be written there; OSError names the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"out: cannot write to {folder}: {error.strerror}; give another folder with --out") from None


def only_sweep(folder: Path, command: str) -> contextlib.AbstractContextManager[None]:
    """Hold the folder; ValueError at once, naming process and command, where another sweep holds it."""
    return only_writer(folder, LOCK, command)
