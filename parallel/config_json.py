"""Configurations as what JSON holds, and back: what checkpoints and weights files say of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any


def to_json(config: Any) -> dict[str, Any]:
    """A whole tree of configurations as what JSON holds: paths become strings."""
    return _plain(asdict(config))


def from_json(kind: type[Any], data: dict[str, Any], name: str) -> Any:
    """A configuration of some kind from the entry `name` of what to_json wrote.

    Raises:
        ValueError: it is missing, holds wrong types, or is not one of this version; names the field.
    """
    fields = data.get(name)
    if not isinstance(fields, dict):
        raise ValueError(f"{name}: expected an object, got {fields!r}")
    try:
        return kind(**{key: tuple(item) if isinstance(item, list) else item for key, item in fields.items()})
    except TypeError as error:
        raise ValueError(f"{name}: not one of this version: {error}") from error


def clip_size_from_json(data: Any) -> dict[str, int]:
    """num_frames, height and width of the training clips; ValueError names what is missing or no number."""
    if not isinstance(data, dict):
        raise ValueError(f"clip_size: expected an object, got {data!r}")
    sizes = {name: data.get(name) for name in ("num_frames", "height", "width")}
    for name, size in sizes.items():
        if type(size) is not int:
            raise ValueError(f"{name}: expected a whole number, got {size!r}")
    return {name: size for name, size in sizes.items() if type(size) is int}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
