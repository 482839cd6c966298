from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from longreel.reports.records import SCHEMA_VERSION, Record


def test_json_round_trip_keeps_every_field(make_record):
    record = make_record(energy_j=1.5, mfu=0.4, memory_limit=80 * 2**30)
    assert Record.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    ("memory", "peak", "meaning"),
    [
        ({"allocated": 7, "process": 9}, 7, "allocated"),
        ({"process": 900, "process_before": 860}, 40, "step"),
        ({"process": 900}, 900, "process"),
        ({}, None, "allocated"),
    ],
)
def test_peak_memory_of_a_process_is_what_the_step_adds(make_record, memory, peak, meaning):
    record = make_record(memory=memory)
    assert record.peak_memory == peak
    assert record.memory_meaning == meaning


def test_error_that_is_not_finite_survives_as_strict_json(make_record):
    record = make_record(status="wrong", reason="NaN gradient", error={"loss": math.inf, "grad": math.nan})
    line = record.to_json()
    json.loads(line, parse_constant=pytest.fail)
    back = Record.from_json(line)
    assert back.error["loss"] == math.inf
    assert math.isnan(back.error["grad"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, "newer longreel"),
        ({"schema_version": "1"}, "schema_version must be an integer"),
        ({"surprise": 1}, "unknown fields in record: surprise"),
        ({"seq_len": "8192"}, "seq_len must be int"),
        ({"interval_s": [1.0]}, "interval_s must be"),
        ({"memory": {"allocated": "much"}}, "memory must be"),
        ({"kind": "guessed"}, "kind must be one of measured"),
        ({"num_devices": 3}, "must be num_devices 3"),
        ({"step_s": 0.0}, "step_s must be positive"),
    ],
)
def test_bad_field_is_an_error_that_names_it(make_record, change, message):
    data = json.loads(make_record().to_json()) | change
    with pytest.raises(ValueError, match=message):
        Record.from_json(json.dumps(data))


def test_missing_field_is_an_error_that_names_it(make_record):
    data = json.loads(make_record().to_json())
    del data["strategy"]
    with pytest.raises(ValueError, match="lacks the field strategy"):
        Record.from_json(json.dumps(data))


def test_key_ignores_results_and_time_but_not_the_point(make_record):
    record = make_record()
    assert replace(record, step_s=9.0, interval_s=None, attention="flash").key == record.key
    later = dict(record.provenance) | {"time": "2027-01-01T00:00:00Z"}
    assert replace(record, provenance=later).key == record.key
    for change in ({"policy": "none"}, {"seq_len": 2048}, {"provenance": {"commit": "b"}}, {"config": {"seed": 1}}):
        assert replace(record, **change).key != record.key
