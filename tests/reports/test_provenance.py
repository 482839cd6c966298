from __future__ import annotations

from longreel.reports.provenance import origins


def provenance(**changes: object) -> dict[str, object]:
    return {
        "commit": "a1",
        "time": "10:00",
        "versions": {"torch": "2.13.0"},
        "environment": {"gpus": ["x", "y"]},
    } | changes


def test_points_that_differ_only_in_time_have_one_origin(make_record):
    records = [make_record(provenance=provenance(time=f"10:0{i}", clock_mhz=1000 + i)) for i in (2, 0, 1)]
    (origin,) = origins(records)
    assert origin.num_records == 3
    assert origin.kind == "measured"
    assert origin.facts == (
        ("commit", "a1"),
        ("time", "10:00 to 10:02"),
        ("torch", "2.13.0"),
        ("gpus", "x y"),
        ("clock_mhz", "3 different values, see the records"),
    )


def test_each_commit_version_and_command_is_an_origin_of_its_own(make_record):
    changes = [{}, {"commit": "b2"}, {"versions": {"torch": "2.14"}}, {"command": "make sweep"}, {"dirty": True}]
    found = origins([make_record(provenance=provenance(**change)) for change in changes])
    assert [origin.num_records for origin in found] == [1] * 5
    assert ("dirty", "yes") in found[-1].facts


def test_kinds_have_origins_of_their_own(make_record):
    changes = {"measured": {"warm_up": "1 step"}, "predicted": {"inputs": {"target": "H800"}}}
    found = origins([make_record(kind=kind, provenance=provenance(**more)) for kind, more in changes.items()])
    assert [origin.kind for origin in found] == ["measured", "predicted"]
    assert [dict(origin.facts).get("warm_up") for origin in found] == ["1 step", None]
    assert [dict(origin.facts).get("inputs.target") for origin in found] == [None, "H800"]


def test_bytes_have_a_unit(make_record):
    (origin,) = origins([make_record(provenance=provenance(environment={"memory_bytes": 8 * 2**30}))])
    assert ("memory", "8.00 GiB") in origin.facts
