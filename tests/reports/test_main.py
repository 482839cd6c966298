from __future__ import annotations

import subprocess
import sys

import pytest

from longreel.reports import store
from longreel.reports.__main__ import main


@pytest.fixture
def record_file(tmp_path, sweep):
    path = tmp_path / "in" / "records.jsonl"
    path.parent.mkdir()
    path.write_text("".join(record.to_json() + "\n" for record in sweep))
    return path


def test_file_is_rendered_beside_itself(record_file, capsys):
    assert main([str(record_file)]) == 0
    assert (record_file.parent / "report.html").exists()
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {record_file.parent / 'report.html'}"


def test_folder_renders_all_its_record_files_together(record_file, make_record, tmp_path):
    store.append(record_file.parent / "more.jsonl", make_record(seq_len=32768))
    assert main([str(record_file.parent), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "from more.jsonl, records.jsonl" in text
    assert "32,768" in text


def test_unfinished_last_line_is_a_warning(record_file, capsys):
    record_file.write_text(record_file.read_text()[:-20])
    assert main([str(record_file)]) == 0
    assert capsys.readouterr().err.startswith("longreel.reports: warning: ")


@pytest.mark.parametrize("case", ["missing", "no-records-in-folder", "empty", "broken", "blocked-out"])
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(record_file, tmp_path, capsys, case):
    source, out = record_file, tmp_path / "out"
    if case == "missing":
        source = tmp_path / "nothing.jsonl"
    elif case == "no-records-in-folder":
        source = tmp_path
    elif case == "empty":
        source.write_text("")
    elif case == "broken":
        source.write_text("{}\n" + source.read_text())
    else:
        out.write_text("a file")
    assert main([str(source), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("longreel.reports: ")
    assert not out.is_dir()


def test_command_line_errors_are_one_line_too(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--nonsense"])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_reports_need_no_torch(record_file):
    code = (
        "import sys; from longreel.reports.__main__ import main; main(sys.argv[1:]); "
        "sys.exit(any(m == 'torch' or m == 'matplotlib.pyplot' for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(record_file)], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
