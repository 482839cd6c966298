"""models/publish.py: files appear whole or not at all, whoever else writes them at the same moment."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from longreel.models.publish import published


def test_writers_with_one_process_id_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    # As containers on two nodes, in each of which this is process 7.
    with published(path) as ours:
        ours.write_text("ours")
        with published(path) as theirs:
            theirs.write_text("theirs")
        assert path.read_text() == "theirs"
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text("before")
    with suppress(KeyboardInterrupt), published(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
