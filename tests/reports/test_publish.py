from __future__ import annotations

import re
from dataclasses import replace

import pytest

from longreel.reports import publish, store


@pytest.fixture
def sources(tmp_path, sweep):
    """The sweep in two files, one point in both."""
    for name, records in (("a", sweep[:20]), ("b", sweep[19:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


def test_records_of_all_sources_are_packed_beside_their_page(tmp_path, sources, sweep, capsys):
    out = tmp_path / "out"
    assert publish.main([*map(str, sources), "--out", str(out), "--title", "Ours"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["records.jsonl.gz", "report.html"]
    assert store.load(out / "records.jsonl.gz") == sweep
    assert "<h1>Ours</h1>" in (out / "report.html").read_text()
    assert re.search(r"report\.html: [\d,]+ bytes", capsys.readouterr().out)
    before = [path.read_bytes() for path in sorted(out.iterdir())]
    publish.main([*map(str, sources), "--out", str(out), "--title", "Ours"])
    assert [path.read_bytes() for path in sorted(out.iterdir())] == before


def test_too_much_to_keep_is_an_error_and_writes_nothing(tmp_path, sources, monkeypatch, capsys):
    monkeypatch.setattr(publish, "MAX_BYTES", 100_000)
    assert publish.main([*map(str, sources), "--out", str(tmp_path / "out")]) == 2
    assert "33 records make" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, "", "{}\n"], ids=["missing", "empty", "no-record"])
def test_bad_source_is_one_line(tmp_path, sources, content, capsys):
    bad = tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_text(content)
    assert publish.main([str(sources[0]), str(bad), "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_later_word_on_a_point_counts(tmp_path, make_record):
    first, again = make_record(status="error", reason="worker died"), make_record()
    for i, record in enumerate((first, replace(again))):
        (tmp_path / f"{i}.jsonl").write_text(record.to_json() + "\n")
    publish.publish([tmp_path / "0.jsonl", tmp_path / "1.jsonl"], tmp_path / "out", title="T")
    assert store.load(tmp_path / "out" / "records.jsonl.gz") == [again]
