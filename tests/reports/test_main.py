from __future__ import annotations

import gzip
import subprocess
import sys
from dataclasses import replace

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
        "import runpy, sys\n"
        "try: runpy.run_module('longreel.reports', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "sys.exit(any(m == 'torch' or m == 'matplotlib.pyplot' for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(record_file)], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_packed_records_render_as_the_plain_ones(record_file, tmp_path):
    packed = tmp_path / "records.jsonl.gz"
    packed.write_bytes(gzip.compress(record_file.read_bytes()))
    assert main([str(packed), "--page-only", "--title", "T"]) == 0
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"records.jsonl.gz", "report.html"}
    assert "from records.jsonl.gz" in (tmp_path / "report.html").read_text()


def test_records_of_ops_make_the_kernels_page_and_a_section_of_a_sweeps(record_file, tmp_path, make_op):
    ops = tmp_path / "ops.jsonl"
    ops.write_text("".join(make_op(name).to_json() + "\n" for name in ("triton", "sdpa-cudnn")))
    assert main([str(ops), "--out", str(tmp_path / "kernels")]) == 0
    assert "Longreel kernels" in (tmp_path / "kernels" / "report.html").read_text()
    document = tmp_path / "codegen.md"
    document.write_text("# Compiled\n\n## Part\n\nwords\n")
    more = ["--kernels", str(ops), "--codegen", str(document), "--page-only", "--out", str(tmp_path / "out")]
    assert main([str(record_file), *more]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index('<h2 id="kernels">') < page.index('<h2 id="codegen">') < page.index('<h2 id="environment">')


def test_document_becomes_a_page(tmp_path, capsys):
    (tmp_path / "codegen.md").write_text("# Compiled\n\ntext\n")
    assert main([str(tmp_path / "codegen.md"), "--out", str(tmp_path / "out")]) == 0
    assert "<h1>Compiled</h1>" in (tmp_path / "out" / "codegen.html").read_text()
    assert capsys.readouterr().out == f"page: {tmp_path / 'out' / 'codegen.html'}\n"


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (0.5, 0), (2.0, 1)])
def test_two_runs_are_compared_and_the_exit_code_tells_regressions(
    record_file, sweep, tmp_path, capsys, factor, status
):
    new = tmp_path / "new.jsonl"
    slower = [replace(r, step_s=r.step_s * factor) if r.kind == "predicted" and r.step_s else r for r in sweep]
    new.write_text("".join(record.to_json() + "\n" for record in slower))
    assert main([str(record_file), str(new), "--html", str(tmp_path / "runs.html")]) == status
    out = capsys.readouterr().out
    # 14 of the 16 predicted points fit.
    assert f"Regressions: {14 if status else 0}\n" in out
    assert (tmp_path / "runs.html").read_text().count("<h1>") == 1


def test_thresholds_and_missing_points_are_options(record_file, sweep, tmp_path, capsys):
    new = tmp_path / "new.jsonl"
    new.write_text("".join(replace(r, step_s=r.step_s and 1.1 * r.step_s).to_json() + "\n" for r in sweep[1:]))
    assert main([str(record_file), str(new)]) == 1
    assert main([str(record_file), str(new), "--min-change", "15"]) == 0
    assert main([str(record_file), str(new), "--min-change", "15", "--fail-on-missing"]) == 1
    assert main([str(record_file), str(new), "--min-change", "150"]) == 2
    assert "size must lie between 0 and 1" in capsys.readouterr().err
