from __future__ import annotations

import json

import pytest

from longreel.reports import embed


@pytest.mark.parametrize(
    "rows",
    [
        [{"a": 1, "b": {"c": [1, 2]}}],
        [{"a": 1}, {"a": 1.0}, {"a": True}, {"a": None}, {"a": "1"}],
        [{"a": {"x": 1}}, {"a": {"x": 2, "y": 3}}, {"a": {}}, {}],
        [{"a": {"x": 1}}, {"a": 5}, {"a": None}],
        [{"a": 1}, {"a": "1"}, {"a": 1.0}, {"a": "None"}, {"a": None}, {"a": [1]}, {"a": "[1]"}] * 3,
        [{}, {}],
        [{"same": 1, "pick": [0], "each": {"of": 2}, "object": None}] * 3,
        [{"": i % 3} for i in range(20)],
    ],
    ids=[
        "one",
        "types",
        "missing-keys",
        "object-or-not",
        "repeated-types",
        "empty",
        "names-of-the-format",
        "few-values",
    ],
)
def test_unpack_gives_back_what_was_packed(rows):
    packed = json.loads(json.dumps(embed.pack(rows)))
    unpacked = json.dumps(embed.unpack(packed, len(rows)), sort_keys=True)
    assert unpacked == json.dumps(rows, sort_keys=True)


def test_pack_of_records_round_trips_and_stores_what_they_share_once(sweep):
    rows = [json.loads(record.to_json()) for record in sweep]
    packed = embed.pack(rows)
    assert embed.unpack(packed, len(rows)) == rows
    assert json.dumps(packed).count("python bench/sweep.py") == 1


def test_script_json_cannot_end_or_confuse_its_script():
    text = "</script><!--<script>&amp;\u2028 é"
    written = embed.script_json({text: text})
    assert not set("<>&") & set(written)
    assert written.isascii()
    assert json.loads(written) == {text: text}
