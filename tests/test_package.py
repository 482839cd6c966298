"""The package as installed: its name does not take others' names, and it is what the folders hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import longreel

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["kernels", "models", "data", "parallel", "bench", "reports"])
def test_top_level_names_are_not_ours(name, tmp_path):
    # From another folder: Python itself puts the working folder on sys.path for -c and -m.
    code = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(ROOT) not in done.stdout


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", ["kernels", "models", "data"])
def test_lower_layers_know_no_ranks(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert not any(name.startswith("torch.distributed") for name in imported_names(path)), path


def test_raw_collectives_live_in_one_file():
    collectives = re.compile(r"dist\.(all_\w+|reduce\w*|broadcast\w*|i?send|i?recv|batch_isend_irecv|gather|scatter)\(")
    for folder in ("parallel", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "comm.py":
                assert not collectives.search(path.read_text()), path


def test_scripts_shadow_no_module():
    # Running a script puts its folder first on sys.path.
    taken = set(sys.stdlib_module_names) | {"torch", "triton", "numpy", "tyro", "rich", "av", "kernels", "diffusers"}
    for folder in ("bench", "data", "parallel"):
        names = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
        names |= {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
        assert not names & taken, folder


def test_a_wheel_holds_every_package():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = ("kernels", "models", "data", "parallel", "bench", "reports")
    found = {path.parent for folder in folders for path in (ROOT / folder).rglob("__init__.py")}
    assert listed == {"longreel"} | {f"longreel.{'.'.join(path.relative_to(ROOT).parts)}" for path in found}


def test_runs_from_a_checkout_without_an_install():
    code = "import longreel.kernels, pathlib; print(pathlib.Path(longreel.__file__).resolve().parent)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}; {code}"],
        cwd=ROOT.parent,
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(ROOT / "src" / "longreel")


def test_imports_are_light():
    # `import longreel` must not drag torch in: reports and error messages start fast.
    code = "import longreel, longreel.reports.records, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
    assert longreel.__version__
