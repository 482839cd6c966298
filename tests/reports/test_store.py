from __future__ import annotations

import gzip
import json
import os
import warnings

import pytest

from longreel.reports import store
from longreel.reports.records import SCHEMA_VERSION


def test_append_then_load_gives_the_records_in_order(tmp_path, sweep):
    path = tmp_path / "new" / "records.jsonl"
    for record in sweep:
        store.append(path, record)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.load(path) == sweep
    assert path.read_text().count("\n") == len(sweep)


@pytest.mark.parametrize("keep", [1, 40, -2], ids=["one-byte", "some", "all-but-the-brace"])
def test_unfinished_last_line_is_dropped_and_the_next_append_is_whole(tmp_path, make_record, keep):
    path = tmp_path / "records.jsonl"
    first, second = make_record(), make_record(seq_len=2048)
    store.append(path, first)
    path.write_bytes(path.read_bytes() + (second.to_json() + "\n").encode()[:keep])
    with pytest.warns(UserWarning, match=r"records.jsonl:2: dropped an unfinished last line"):
        assert store.load(path) == [first]
    with pytest.warns(UserWarning, match="cut off"):
        store.append(path, second)
    assert store.load(path) == [first, second]


@pytest.mark.parametrize("text", ["a letter to my aunt", "[1, 2", "x"])
def test_last_line_that_is_no_record_is_an_error_and_stays(tmp_path, make_record, text):
    path = tmp_path / "records.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"records\.jsonl:1: not a record"):
        store.load(path)
    with pytest.raises(ValueError, match="last line is not a record"):
        store.append(path, make_record())
    assert path.read_text() == text


def test_warnings_are_lines_without_code(tmp_path, make_record, capsys):
    path = tmp_path / "records.jsonl"
    path.write_text('{"kind": "mea')
    with store.warnings_as_lines("me: "):
        store.load(path)
        store.append(path, make_record())
    assert capsys.readouterr().err == (
        f"me: warning: {path}:1: dropped an unfinished last line\n"
        f"me: warning: {path}: cut off 13 bytes of an unfinished last line\n"
    )


def test_whole_last_line_without_newline_counts(tmp_path, make_record):
    path = tmp_path / "records.jsonl"
    first, second = make_record(), make_record(seq_len=2048)
    path.write_text(first.to_json())
    assert store.load(path) == [first]
    store.append(path, second)
    assert store.load(path) == [first, second]


def test_failed_write_leaves_the_file_as_it_was(tmp_path, make_record, monkeypatch):
    path = tmp_path / "records.jsonl"
    store.append(path, make_record())
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        store.append(path, make_record(seq_len=2048))
    assert path.read_bytes() == before


def test_record_that_is_not_json_writes_nothing(tmp_path, make_record):
    path = tmp_path / "records.jsonl"
    with pytest.raises(ValueError, match="JSON"):
        store.append(path, make_record(flops=float("nan")))
    assert not path.exists()


@pytest.mark.parametrize("middle", [b'{"kind": "mea', b"[1]", b"\xff\xfe", b"NaN"])
def test_broken_middle_line_names_file_and_line(tmp_path, make_record, middle):
    path = tmp_path / "records.jsonl"
    line = make_record().to_json().encode()
    path.write_bytes(line + b"\n" + middle + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=r"records\.jsonl:2: "):
        store.load(path)


def test_newer_schema_is_an_error_even_in_the_last_line(tmp_path, make_record):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(json.loads(make_record().to_json()) | {"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(
        ValueError, match=rf"records\.jsonl:1: record has schema version {SCHEMA_VERSION + 1}.*newer longreel"
    ):
        store.load(path)


def test_packed_file_is_read_and_a_torn_one_is_an_error(tmp_path, sweep):
    path = tmp_path / "records.jsonl.gz"
    packed = gzip.compress("".join(r.to_json() + "\n" for r in sweep).encode())
    path.write_bytes(packed)
    assert store.load(path) == sweep
    path.write_bytes(packed[:-20])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        store.load(path)


def test_latest_keeps_the_last_word_on_each_point(make_record):
    failed = make_record(status="error", reason="worker died")
    other, again = make_record(seq_len=2048), make_record()
    assert store.latest([failed, other, again]) == [again, other]


def test_write_files_writes_none_when_one_cannot_be_written(tmp_path):
    (tmp_path / "blocked").write_text("a file, not a folder")
    with pytest.raises(OSError, match="blocked"):
        store.write_files({tmp_path / "a.txt": "a", tmp_path / "blocked" / "b.txt": "b"})
    assert [p.name for p in tmp_path.iterdir()] == ["blocked"]
