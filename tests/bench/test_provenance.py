"""longreel.bench.provenance: complete, and without the machine's paths."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import torch

from longreel.bench import provenance


def test_says_commit_versions_machine_and_time() -> None:
    found = provenance.stamped(provenance.gather(["bench/sweep.py", "--preset", "quick"]))
    assert re.fullmatch(r"[0-9a-f]{40}", found["commit"]) or found["commit"].startswith("unknown")
    assert found["dirty"] in (True, False, None)
    assert set(found["versions"]) == {"python", "torch", "triton", "numpy"}
    assert found["versions"]["torch"] == torch.__version__
    environment = found["environment"]
    assert environment["cores"] >= 1
    assert environment["threads_per_rank"] == 1
    assert environment["cpu"]
    assert environment["memory_bytes"] > 2**28
    assert environment["platform"]
    assert environment["torch"] == torch.__version__
    assert found["command"] == "python bench/sweep.py --preset quick"
    assert datetime.fromisoformat(found["time"]).utcoffset().total_seconds() == 0


def test_command_names_no_path_of_the_machine(tmp_path: Path) -> None:
    inside = Path.cwd() / "out" / "here"
    command = provenance.gather(["/somewhere/else/sweep.py", "--out", str(tmp_path / "mine"), f"--out={inside}"])
    assert command["command"] == "python sweep.py --out mine --out=out/here"


def test_outside_git_the_commit_is_unknown_in_words(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "_REPOSITORY", tmp_path)
    found = provenance.gather(["sweep.py"])
    assert found["commit"].startswith("unknown")
    assert found["dirty"] is None


def test_edited_code_and_another_torch_make_another_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "_REPOSITORY", tmp_path)
    (tmp_path / "parallel" / "predict").mkdir(parents=True)
    file = tmp_path / "parallel" / "predict" / "roofline.py"
    found = []
    for text in ("rate = 1", "rate = 2", "rate = 1"):
        file.write_text(text)
        found.append(provenance.gather(["x"])["environment"])
    # What did not change has the same key again, wherever the tree lies.
    assert found[0] == found[2] != found[1]
    monkeypatch.setattr(provenance, "_version", lambda package: "9.9")
    assert provenance.gather(["x"])["environment"] not in found
