"""reports/run_page.py: one page of a training run, with its curves and clips, also of a run that crashed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longreel.reports.__main__ import main
from longreel.reports.run_page import read_metrics, write_run_page


def run(folder: Path, steps: int = 60) -> Path:
    folder.mkdir()
    lines = [{"step": i, "loss": 1 / i, "grad_norm": 2.0, "tokens_per_s": 100.0 * i} for i in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_page_holds_curves_clips_and_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "run <1>")
    (folder / "clip.mp4").write_bytes(b"a clip")
    (folder / "demo").mkdir()
    (folder / "demo" / "drawn.mp4").write_bytes(b"not sampled")
    checkpoint = folder / "checkpoints" / "step-000060"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").write_text(json.dumps({"config": {"steps": "<b>60</b>"}}))
    assert main([str(folder)]) == 0
    assert f"report: {folder}/run.html" in capsys.readouterr().out
    page = (folder / "run.html").read_text()
    assert page.count("<svg") == 3
    for title in ("Loss", "Throughput, tokens/s over all ranks", "Norm of the gradients"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert page.count("<video") == 1
    assert "drawn.mp4" not in page
    assert "3,100" in page
    assert "&lt;b&gt;60&lt;/b&gt;" in page
    assert "run &lt;1&gt;" in page
    assert "<b>60" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_figures_that_were_not_finite_are_left_out_of_curves(tmp_path: Path) -> None:
    """As the norm of a step that overflowed, and the loss of the step that ended a run."""
    folder = run(tmp_path / "run", 3)
    path = folder / "metrics.jsonl"
    ended = {"step": 4, "loss": None, "grad_norm": None, "loss_scale": None}
    path.write_text(path.read_text() + json.dumps(ended) + "\n")
    page = write_run_page(folder, folder).read_text()
    assert page.count("<svg") == 3
    assert "<td>last loss</td><td>not finite</td>" in page


def test_a_line_cut_off_by_a_crash_is_left_out_and_a_broken_one_named(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", 3)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    write_run_page(folder, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "run.html").is_file()
    path.write_text('{"step": 1\n{"step": 2, "loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not JSON"):
        read_metrics(path)
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not a line of a training run"):
        read_metrics(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no line yet"):
        read_metrics(path)
    assert main([str(folder)]) == 2
