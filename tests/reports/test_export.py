from __future__ import annotations

import csv
import io

import pytest

from longreel.reports import export
from longreel.reports.compare import group_records
from longreel.reports.figures import draw_group


def test_csv_has_derived_columns_and_empty_cells_where_there_is_no_figure(sweep):
    rows = list(csv.DictReader(io.StringIO(export.csv_text(sweep))))
    assert len(rows) == len(sweep)
    assert list(rows[0]) == [*export.CSV_FIELDS, *export.CSV_DERIVED]
    row = next(r for r in rows if r["strategy"] == "ulysses" and r["policy"] == "none" and r["seq_len"] == "2048")
    assert float(row["step_s"]) == pytest.approx(1.6)
    assert float(row["step_low_s"]) == pytest.approx(1.52)
    assert float(row["tokens_per_s"]) == pytest.approx(2048 / 1.6)
    assert float(row["samples_per_s"]) == pytest.approx(1 / 1.6)
    # 1 sample in 1.6 s against the baseline's 2 (DP 2) in 4 s.
    assert float(row["ratio_to_baseline"]) == pytest.approx(1.25)
    assert int(row["bytes_sent"]) == 1500
    assert int(row["num_samples"]) == 3
    wrong = next(r for r in rows if r["status"] == "wrong")
    assert wrong["tokens_per_s"] == wrong["ratio_to_baseline"] == ""
    assert wrong["reason"] == "grad off by 3"
    predicted = next(r for r in rows if r["strategy"] == "ulysses" and r["seq_len"] == "131072")
    assert float(predicted["exposed_s"]) == pytest.approx(0.06 * float(predicted["step_s"]))
    assert predicted["verdict"] == "AMBIGUOUS"
    assert predicted["reproduce"] == "python bench/sweep.py"
    assert wrong["verdict"] == wrong["exposed_s"] == ""


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", '=HYPERLINK("http://x")'])
def test_no_text_is_a_formula(make_record, text):
    record = make_record(status="error", reason=text, device=text, provenance={"reproduce": text, "commit": text})
    (row,) = csv.DictReader(io.StringIO(export.csv_text([record])))
    for column in ("reason", "device", "reproduce", "commit"):
        assert row[column] == f"'{text}"
    assert not any(value[:1] in "=+-@\t" for value in row.values() if value)


def test_exposed_is_communication_by_its_name_and_whatever_can_hide(make_record):
    parts = {"attention": 1.0, "sharding": 0.25, "offload": 0.25, "gossip": 0.5}
    record = make_record(breakdown=parts, hidden={"gossip": 0.0})
    assert export.exposed_seconds(record) == pytest.approx(1.0)
    assert export.exposed_seconds(make_record()) is None


def test_numbers_and_plain_texts_stay_as_they_are():
    assert [export.csv_cell(value) for value in (-1.5, None, True, "a=b")] == [-1.5, None, True, "a=b"]


def test_reproduce_prefers_the_records_own_command(make_record):
    assert export.reproduce(make_record()) == "python bench/sweep.py"
    own = make_record(provenance={"command": "python bench/sweep.py", "reproduce": "python bench/sweep.py --one"})
    assert export.reproduce(own) == "python bench/sweep.py --one"
    assert export.reproduce(make_record(provenance={})) is None


def test_figure_csv_has_a_line_per_point(sweep):
    group, records = next((g, found) for g, found in group_records(sweep).items() if g.kind == "predicted")
    drawing = draw_group(group, records)[0]
    rows = list(csv.DictReader(io.StringIO(export.figure_csv(drawing.marks, drawing.axis))))
    assert len(rows) == len(drawing.marks)
    by_key = {r.key: r for r in sweep}
    for row in rows:
        record = by_key[row["key"]]
        assert float(row["tokens/s, all devices"]) == record.tokens_per_s
        assert float(row["tokens_per_s_low"]) < record.tokens_per_s < float(row["tokens_per_s_high"])
