"""longreel.data.captions: what a captions file may hold, and the place every error names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longreel.data.captions import CaptionedFile, load_captions, read_captions


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "captions.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_entries_keep_their_order_and_extra_keys_are_ignored(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [{"file": "b/x.mp4", "captions": ["one", "zwei ü"]}, {"file": "a.mp4", "captions": ["three"], "source": "us"}],
    )
    assert load_captions(path) == [
        CaptionedFile(file="b/x.mp4", captions=("one", "zwei ü")),
        CaptionedFile(file="a.mp4", captions=("three",)),
    ]


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf[{"file": "a.mp4", "captions": ["x"]}]')
    assert load_captions(path)[0].file == "a.mp4"


GOOD = {"file": "a.mp4", "captions": ["x"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b'[\n {"file": "a.mp4" "captions": []}\n]', ":2:19: not valid JSON", id="missing-comma"),
        pytest.param(b"", ":1:1: not valid JSON", id="empty-file"),
        pytest.param(b"[" + b"9" * 5000 + b"]", "not a captions file: Exceeds the limit", id="endless-number"),
        pytest.param(b'[{"file": "a', ":1:11: not valid JSON", id="cut-off"),
        pytest.param(b'[\n{"file": "\xff"}]', ":2:11: not UTF-8", id="not-utf8"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="nested"),
        pytest.param(GOOD, "expected a list", id="object-not-list"),
        pytest.param([], "the list is empty", id="empty-list"),
        pytest.param([GOOD, "b.mp4"], "entry 1: expected .* got a string", id="entry-is-string"),
        pytest.param([GOOD, {"captions": ["x"]}], 'entry 1: "file" is missing', id="no-file"),
        pytest.param(
            [{"file": "a.mp4", "caption": "x"}], "\"captions\" is missing; keys are 'file', 'caption'", id="typo"
        ),
        pytest.param([{"file": 3, "captions": ["x"]}], 'entry 0: "file" must be a path .* got 3', id="file-number"),
        pytest.param([{"file": " ", "captions": ["x"]}], 'entry 0: "file" must be a path', id="file-blank"),
        pytest.param([{"file": "a\0b", "captions": ["x"]}], 'entry 0: "file" must be a path', id="file-nul"),
        pytest.param([{"file": "a.mp4", "captions": "x"}], "at least one string, got a string", id="captions-string"),
        pytest.param([{"file": "a.mp4", "captions": []}], "at least one string, got an empty list", id="no-captions"),
        pytest.param(
            [{"file": "a.mp4", "captions": ["x", 1]}], r'"captions"\[1\] must be a string', id="caption-number"
        ),
        pytest.param([{"file": "a.mp4", "captions": [" "]}], r'"captions"\[0\] must be a string', id="caption-blank"),
        pytest.param([GOOD, GOOD], "entry 1: .* already entry 0", id="duplicate"),
        pytest.param([GOOD, {"file": "./a.mp4", "captions": ["y"]}], "entry 1: .* already entry 0", id="same-path"),
        pytest.param([{"file": "/etc/a.mp4", "captions": ["x"]}], "leaves the folder", id="absolute"),
        pytest.param([{"file": "b/../../a.mp4", "captions": ["x"]}], "leaves the folder", id="dot-dot"),
    ],
)
def test_bad_file_is_one_line_with_the_place(tmp_path: Path, content: object, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as raised:
        load_captions(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        load_captions(tmp_path / "nothing.json")


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"file": "a.mp4", "captions": ["x"]}\n\n{"file": "b.mp4", "captions": ["y", "z"]}\n')
    assert load_captions(path) == [
        CaptionedFile(file="a.mp4", captions=("x",)),
        CaptionedFile(file="b.mp4", captions=("y", "z")),
    ]
    path.write_text('{"file": "a.mp4", "captions": ["x"]}\n{"file"')
    with pytest.raises(ValueError, match=r"captions\.jsonl: line 2: not valid JSON"):
        load_captions(path)


def test_csv_with_quotes_line_breaks_and_several_captions(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_bytes(
        '\ufeffid,path,text\r\n1,a.mp4,"one, ""two""\nlines"\r\n2,b.mp4,zwei ü\r\n3,./a.mp4,more\r\n'.encode()
    )
    assert load_captions(path) == [
        CaptionedFile(file="a.mp4", captions=('one, "two"\nlines', "more")),
        CaptionedFile(file="b.mp4", captions=("zwei ü",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "file,caption\na,b\n", "has no column path and text; .* it has file, caption"),
        ("c.csv", "", "has no column path and text; .* it has nothing"),
        ("c.csv", "path,text\n", "holds no entry"),
        ("c.csv", "path,text\na.mp4\n", r'line 2: "captions"\[0\] must be a string that is not blank, got None'),
        ("c.jsonl", "\n\n", "holds no entry"),
        ("c.txt", "x", r"a captions file ends in \.json, \.jsonl, \.csv"),
    ],
)
def test_other_formats_refuse(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_captions(path)
    assert "\n" not in str(raised.value)


def test_reading_leniently_keeps_what_is_right(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD, "b.mp4", {"file": "./a.mp4", "captions": ["y"]}, {"file": "../c", "captions": ["x"]}])
    entries, problems = read_captions(path)
    assert entries == [CaptionedFile(file="a.mp4", captions=("x", "y"))]
    assert [(problem.where.rpartition(": ")[2], problem.merged) for problem in problems] == [
        ("entry 1", False),
        ("entry 2", True),
        ("entry 3", False),
    ]


def test_a_wrong_caption_costs_itself(tmp_path: Path) -> None:
    path = write(tmp_path, [{"file": "a.mp4", "captions": ["", "x", 3, "y"]}, {"file": "b.mp4", "captions": [" "]}])
    entries, problems = read_captions(path)
    assert entries == [CaptionedFile(file="a.mp4", captions=("x", "y"))]
    assert [problem.where.rpartition(": ")[2] for problem in problems] == ["entry 0", "entry 0", "entry 1"]
    assert problems[1].reason == '"captions"[2] must be a string that is not blank, got 3'
    lines = tmp_path / "captions.jsonl"
    lines.write_bytes(b'{"file": "a.mp4", "captions": ["caf\xe9", "good"]}\r\n')
    entries, (problem,) = read_captions(lines)
    assert entries == [CaptionedFile(file="a.mp4", captions=("good",))]
    assert "not UTF-8 text" in problem.reason


@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "c.csv"])
def test_utf_16_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('[{"file": "a.mp4", "captions": ["x"]}]', encoding="utf-16")
    with pytest.raises(ValueError, match=r"UTF-16 text; save it as UTF-8"):
        read_captions(path)
