"""Records in, one self-contained HTML page out: a pure function, and what writes its result beside CSV and figures."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from longreel.reports import embed, formatting
from longreel.reports.compare import (
    Baselines,
    Group,
    Headline,
    configuration,
    group_records,
    headline,
    sharing,
    throughput_interval,
)
from longreel.reports.figures import Drawing, draw_group
from longreel.reports.provenance import origins
from longreel.reports.records import Record
from longreel.reports.store import CSV_DERIVED, CSV_FIELDS, csv_text, derived, latest, write_files
from longreel.reports.svg import standalone
from longreel.reports.tables import Table, build_table

DEFAULT_TITLE = "Longreel sweep"

# How write_report knows its own files: the page by what its template says of itself, figures by their names.
_GENERATOR = '<meta name="generator" content="longreel.reports">'
_FIGURE_NAME = re.compile(r"\d+-(measured|emulated|predicted)-[a-z0-9-]+-(throughput|memory|ratio)\.svg")

KIND_MEANINGS = {
    "measured": "Every rank was a real process, and its steps were timed, one configuration after the other. "
    "Each rank had a device of its own, or on a CPU a core, unless the group says that ranks share them. "
    "The interval runs from the 20th to the 80th percentile of the step times.",
    "emulated": "One rank of P ran for real on one GPU with the true local shapes and memory; each collective was "
    "replaced by a copy of the same bytes plus a modelled time for the target's links.",
    "predicted": "No rank ran. Memory, FLOPs and traffic come from fake tensors, time from a cost model; "
    "the interval gives the model's bounds.",
}
REGIME_MEANINGS = {
    "full": "Self-attention over all tokens of a sample, then text attention. "
    "At long lengths nearly all of the work is attention.",
    "text_only": "Text attention only, no self-attention over the tokens: "
    "linear layers, memory and communication decide. It is the regime of the published Open-Sora table.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    """Everything the page says about one group."""

    id: str
    group: Group
    sharing: str | None
    headline: Headline
    drawings: list[Drawing]
    table: Table


def render(records: Sequence[Record], *, title: str = DEFAULT_TITLE, source_files: Sequence[str] = ()) -> str:
    """The report as one HTML page that needs no network: figures inline, records embedded.

    Args:
        records: what to report; of records with one key only the last counts. title: of the page.
        source_files: names of the files that the records come from, for the reader.

    Raises:
        ValueError: there are no records.
    """
    return _page(_sections(latest(records)), records, title, source_files)


def write_report(
    out_dir: str | os.PathLike[str],
    records: Sequence[Record],
    *,
    title: str = DEFAULT_TITLE,
    source_files: Sequence[str] = (),
) -> Path:
    """Write report.html, records.csv and figures/*.svg to a folder, all or nothing; older figures of ours go.

    Args:
        out_dir: created where it does not exist. Others as in `render`.

    Returns:
        The path of report.html.

    Raises:
        ValueError: there are no records, or the folder holds files of these names that are not ours.
        OSError: the folder cannot be written.
    """
    points = latest(records)
    sections = _sections(points)
    out = Path(out_dir)
    check_ours(out)
    page = out / "report.html"
    files = {page: _page(sections, records, title, source_files), out / "records.csv": csv_text(points)}
    for i, section in enumerate(sections, start=1):
        g = section.group
        name = f"{i}-{formatting.slug(f'{g.kind} {g.regime} {g.num_devices}x {g.device}')}"
        for drawing in section.drawings:
            files[out / "figures" / f"{name}-{drawing.name}.svg"] = standalone(drawing.svg)
    write_files(files)
    for path in (out / "figures").glob("*.svg"):
        if path not in files and _FIGURE_NAME.fullmatch(path.name):
            path.unlink()
    return page


def check_ours(folder: Path) -> None:
    """ValueError where a folder holds something else under the names that write_report writes."""
    page, table, figures = folder / "report.html", folder / "records.csv", folder / "figures"
    ours = {page: _GENERATOR, table: ",".join(list(CSV_FIELDS)[:3])}
    for path, mark in ours.items():
        if path.exists():
            if not path.is_file():
                raise ValueError(f"{path} is in the way: it is not a file; remove it or give another folder")
            with open(path, encoding="utf-8", errors="replace") as file:
                if mark not in file.read(1000):
                    raise ValueError(f"{path} is not ours to replace; remove it or give another folder")
    if figures.exists() and not figures.is_dir():
        raise ValueError(f"{figures} is in the way: it is not a folder; remove it or give another folder")


def _sections(points: Sequence[Record]) -> list[_Section]:
    if not points:
        raise ValueError("there are no records to report")
    baselines = Baselines(points)
    return [
        _Section(
            id=f"g{i}",
            group=group,
            sharing=sharing(found),
            headline=headline(group, found, baselines),
            drawings=draw_group(group, found),
            table=build_table(found, baselines),
        )
        for i, (group, found) in enumerate(group_records(points).items(), start=1)
    ]


def _page(sections: list[_Section], records: Sequence[Record], title: str, source_files: Sequence[str]) -> str:
    points = latest(records)
    environment = Environment(
        loader=PackageLoader("longreel.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": formatting.number,
        "interval": formatting.interval,
        "in_bytes": formatting.in_bytes,
        "configuration": configuration,
        "memory": lambda r: f"{formatting.in_bytes(r.peak_memory)} {formatting.MEMORY_LABELS[r.memory_meaning]}",
        "throughput_interval": throughput_interval,
    }
    # The figures and the data are made by our own code and hold no markup of the records': escaped where they are made.
    environment.filters["markup"] = Markup
    return environment.get_template("report.html.j2").render(
        title=title,
        source_files=[Path(name).name for name in source_files],
        num_records=len(points),
        num_superseded=len(records) - len(points),
        statuses=Counter(r.status for r in points).most_common(),
        sections=sections,
        columns=[*sections[0].table.columns],
        origins=origins(points),
        kind_meanings=KIND_MEANINGS,
        regime_meanings=REGIME_MEANINGS,
        regime_labels=formatting.REGIME_LABELS,
        data=embed.script_json(_data(points)),
    )


def _data(points: Sequence[Record]) -> dict[str, Any]:
    baselines = Baselines(points)
    computed = [derived(record, baselines) for record in points]
    return {
        "about": "records packed by column (longreel.reports.embed), and what records.csv has beside them",
        "num_records": len(points),
        "records": embed.pack([json.loads(record.to_json()) for record in points]),
        "csv_fields": CSV_FIELDS,
        "csv_derived": {name: [_rounded(row[name]) for row in computed] for name in CSV_DERIVED},
    }


def _rounded(value: float | int | None) -> float | int | None:
    return float(f"{value:.9g}") if isinstance(value, float) else value
