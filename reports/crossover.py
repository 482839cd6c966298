"""The map of the strategy that wins, as a section of a report: cells of bench/crossover.py in, tables out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from longreel.reports import formatting
from longreel.reports.html import Part, page_environment

# Nearer than this, the map says so: the model is not that exact.
CLOSE = 0.01
COLORS = {"local": "#9e9e9e", "ulysses": "#1f77b4", "fastseq": "#d95f02", "ring": "#2ca02c", "usp": "#9467bd"}
# The planner asks for that layout under text_only, in which strategies differ by what they exchange.
REGIMES = formatting.REGIME_LABELS | {"text_only": "text attention only, published layout"}
_FIELDS = {"target", "model", "samples", "regime", "gpus", "tokens", "link_gb_s", "strategy", "name", "policy", "ahead"}


def load_cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a map.

    Raises:
        ValueError: the file is no map. OSError: it cannot be read.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a map of bench/crossover.py: {error}") from None
    if not isinstance(cells, list) or not cells or not all(map(_is_cell, cells)):
        raise ValueError(f"{path}: not a map of bench/crossover.py, whose cells have {', '.join(sorted(_FIELDS))}")
    return cells


def _is_cell(cell: object) -> bool:
    if not isinstance(cell, dict) or cell.keys() != _FIELDS:
        return False
    numbers = [cell[name] for name in ("samples", "gpus", "tokens", "link_gb_s")] + [cell["ahead"] or 0.0]
    return all(isinstance(value, int | float) for value in numbers)


def crossover_part(cells: Sequence[Mapping[str, Any]]) -> Part:
    """A table for every regime and number of GPUs: lengths across, links down, in each cell the fastest strategy."""
    lengths, links = (sorted({cell[name] for cell in cells}) for name in ("tokens", "link_gb_s"))
    panels: dict[tuple[str, int], dict[tuple[float, int], Mapping[str, Any]]] = {}
    for cell in cells:
        panels.setdefault((cell["regime"], cell["gpus"]), {})[cell["link_gb_s"], cell["tokens"]] = cell
    body = (
        page_environment({})
        .get_template("crossover.html.j2")
        .render(
            target=cells[0]["target"],
            model=cells[0]["model"],
            samples=cells[0]["samples"],
            lengths=lengths,
            links=links,
            panels=[(REGIMES.get(regime, regime), gpus, found) for (regime, gpus), found in sorted(panels.items())],
            colors=COLORS,
            close=CLOSE,
        )
    )
    return "crossover", "Which strategy wins", Markup(body)
