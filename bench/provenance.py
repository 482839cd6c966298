"""Where a record comes from: commit, versions, machine, command, time. No path and no name of the machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

_PACKAGES = ("torch", "triton", "numpy")
# What decides a figure of a sweep.
_DECISIVE = ("torch", "triton")
_CODE = ("kernels", "models", "data", "parallel", "bench")
_REPOSITORY = Path(__file__).resolve().parents[1]


def gather(command: Sequence[str]) -> dict[str, Any]:
    """Provenance of everything that this process starts; `time` is added per record by `stamped`.

    Args:
        command: program and arguments, as in sys.argv.
    """
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain")
    return {
        "command": " ".join(without_machine(word) for word in ["python", *command]),
        "commit": commit or "unknown: not a git checkout",
        "dirty": None if status is None else bool(status),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "environment": {
            "cpu": cpu_model(),
            "cores": num_cores(),
            "threads_per_rank": 1,
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "platform": f"{platform.system()} {platform.release()}, {platform.machine()}",
        }
        | software(),
    }


def software() -> dict[str, str]:
    """What a figure leans on besides the machine, and what records are told apart by: code and packages."""
    return {"source": source_hash(_CODE), **{name: _version(name) for name in _DECISIVE}}


def source_hash(folders: Sequence[str]) -> str:
    """Hash of the Python files of folders of the project: which code ran, where there is no commit or it was edited."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((_REPOSITORY / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(_REPOSITORY).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def stamped(provenance: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The provenance of one record: with the time now (UTC) and what else concerns this record."""
    return provenance | {"time": datetime.now(UTC).isoformat(timespec="seconds")} | more


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor in the maker's words."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def without_machine(word: str) -> str:
    """An argument whose path is relative to where the command ran, or only its name."""
    option, equals, value = word.rpartition("=")
    path = PurePath(value)
    if not path.is_absolute():
        return word
    here = Path.cwd()
    short = str(path.relative_to(here)) if path.is_relative_to(here) else path.name
    return f"{option}{equals}{short}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
