"""Records in, one self-contained HTML page out: a pure function, and what writes its result beside CSV and figures."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

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
from longreel.reports.export import CSV_FIELDS, csv_text, figure_csv, reproduce
from longreel.reports.figures import draw_group
from longreel.reports.frame import Drawing
from longreel.reports.heatmap import HeatMap, build_heatmap
from longreel.reports.page_data import page_data
from longreel.reports.provenance import origins
from longreel.reports.published import CAVEAT, PUBLISHED, SOURCE, columns, published_ratio
from longreel.reports.records import Kind, Record, Regime, Status
from longreel.reports.scaling import draw_devices
from longreel.reports.store import latest, write_files
from longreel.reports.svg import FONT, PALETTE, standalone
from longreel.reports.tables import Table, build_table

DEFAULT_TITLE = "Longreel sweep"

# How write_report knows its own files: the page by what its template says of itself, figures by their names.
_GENERATOR = '<meta name="generator" content="longreel.reports">'
_FIGURE_NAME = re.compile(
    r"\d+-(measured|emulated|predicted)-[a-z0-9-]+-"
    r"(throughput|memory|traffic|exposed|ratio|(degrees|devices|parts)-\d+)\.(svg|png|csv)"
)

KIND_MEANINGS = {
    "measured": "Every rank was a real process, and its steps were timed: in turns with the baseline's where the row "
    "says so, else one configuration after the other. "
    "Each rank had a device of its own, or on a CPU a core, unless the group says that ranks share them. "
    "The interval runs from the 20th to the 80th percentile of the step times.",
    "emulated": "One rank of P ran for real on one GPU with the true local shapes and memory; each collective was "
    "replaced by a copy of the same bytes plus a modelled time for the target's links. "
    "Long steps are few: the interval is what the extremes of the timed ones allow, at the depth that was run or "
    "continued from two depths; with fewer than four steps there is no verdict.",
    "predicted": "No rank ran. Memory, FLOPs and traffic come from fake tensors, time from a cost model; "
    "the interval gives the model's bounds.",
}
REGIME_MEANINGS = {
    "full": "Self-attention over all tokens of a sample, then text attention. "
    "At long lengths nearly all of the work is attention.",
    "text_only": "Text attention only, no self-attention over the tokens: "
    "linear layers, memory and communication decide. It is the regime of the published Open-Sora table.",
}


# Another page that a report holds as a section: (id, heading, body of our own markup).
Part = tuple[str, str, Markup]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    """Everything the page says about one group."""

    id: str
    group: Group
    sharing: str | None
    headline: Headline
    drawings: list[Drawing]
    heat: HeatMap | None
    table: Table
    records: list[Record]


def render(
    records: Sequence[Record],
    *,
    title: str = DEFAULT_TITLE,
    source_files: Sequence[str] = (),
    parts: Sequence[Part] = (),
) -> str:
    """The report as one HTML page that needs no network: figures inline, records embedded.

    Args:
        records: what to report; of records with one key only the last counts. title: of the page.
        source_files: names of the files that the records come from, for the reader.
        parts: further sections, whose bodies hold no markup but ours.

    Raises:
        ValueError: there are no records.
    """
    points = latest(records)
    return _page(points, _sections(points, png=False), _scaling(points, png=False), records, title, source_files, parts)


def write_report(
    out_dir: str | os.PathLike[str],
    records: Sequence[Record],
    *,
    title: str = DEFAULT_TITLE,
    source_files: Sequence[str] = (),
    parts: Sequence[Part] = (),
    png: bool = False,
    page_only: bool = False,
) -> Path:
    """Write report.html, records.csv and figures/*.svg to a folder, all or nothing; older figures of ours go.

    Args:
        out_dir: created where it does not exist. png: write each figure but the heat maps as a PNG, too.
        page_only: write report.html alone. Others as in `render`.

    Returns:
        The path of report.html.

    Raises:
        ValueError: there are no records, or the folder holds files of these names that are not ours.
        OSError: the folder cannot be written.
    """
    out = Path(out_dir)
    check_ours(out)
    points = latest(records)
    sections, scaling = _sections(points, png=png), _scaling(points, png=png)
    page = out / "report.html"
    files: dict[Path, str | bytes] = {page: _page(points, sections, scaling, records, title, source_files, parts)}
    if page_only:
        write_files(files)
        return page
    files[out / "records.csv"] = csv_text(points)

    def name_of(group: Group) -> str:
        number = next(i for i, section in enumerate(sections, start=1) if section.group == group)
        words = f"{group.kind} {group.regime} {group.num_devices}x {group.device}"
        return f"{number}-{formatting.slug(words)}"

    for section in sections:
        if section.heat:
            files[out / "figures" / f"{name_of(section.group)}-ratio.svg"] = heat_picture(section.group, section.heat)
    drawn = [(section.group, drawing) for section in sections for drawing in section.drawings]
    for group, drawing in [*drawn, *scaling]:
        name = f"{name_of(group)}-{drawing.name}"
        files[out / "figures" / f"{name}.svg"] = standalone(drawing.svg)
        if drawing.marks:
            files[out / "figures" / f"{name}.csv"] = figure_csv(drawing.marks, drawing.axis)
        if drawing.png is not None:
            files[out / "figures" / f"{name}.png"] = drawing.png
    write_files(files)
    for path in (out / "figures").glob("*.*"):
        if path not in files and _FIGURE_NAME.fullmatch(path.name):
            path.unlink()
    return page


def heat_picture(group: Group, heat: HeatMap) -> str:
    """The heat map as an SVG file: in the page it is a table."""
    filters: dict[str, Callable[..., object]] = {"tokens": formatting.length, "printable": formatting.printable}
    picture = page_environment(filters).get_template("heat.svg.j2")
    return picture.render(group=group, heat=heat, font=FONT, up=PALETTE[0], down=PALETTE[1])


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


def _sections(points: Sequence[Record], *, png: bool) -> list[_Section]:
    if not points:
        raise ValueError("there are no records to report")
    baselines = Baselines(points)
    return [
        _Section(
            id=f"g{i}",
            group=group,
            sharing=sharing(found),
            headline=headline(group, found, baselines),
            drawings=draw_group(group, found, png=png),
            heat=build_heatmap(found, baselines),
            table=build_table(found, baselines),
            records=found,
        )
        for i, (group, found) in enumerate(group_records(points).items(), start=1)
    ]


def _scaling(points: Sequence[Record], *, png: bool) -> list[tuple[Group, Drawing]]:
    return draw_devices(group_records(points), png=png)


def _page(
    points: Sequence[Record],
    sections: Sequence[_Section],
    scaling: Sequence[tuple[Group, Drawing]],
    records: Sequence[Record],
    title: str,
    source_files: Sequence[str],
    parts: Sequence[Part],
) -> str:
    index = {id(record): i for i, record in enumerate(points)}

    def marks(drawing: Drawing) -> str:
        return " ".join(f"{m.x:.0f},{m.y:.0f},{index[id(m.record)]}" for m in drawing.marks)

    filters: dict[str, Callable[..., object]] = {
        "number": formatting.number,
        "interval": formatting.interval,
        "ratio": formatting.ratio,
        "tokens": formatting.length,
        "configuration": configuration,
        "memory": lambda r: f"{formatting.in_bytes(r.peak_memory)} {formatting.MEMORY_LABELS[r.memory_meaning]}",
        "throughput_interval": throughput_interval,
        "marks": marks,
        "index": lambda record: index[id(record)],
    }
    data = page_data(points, [(section.id, section.records, section.table) for section in sections])
    return (
        page_environment(filters)
        .get_template("report.html.j2")
        .render(
            title=title,
            source_files=[Path(name).name for name in source_files],
            num_records=len(points),
            num_superseded=len(records) - len(points),
            statuses=Counter(r.status for r in points).most_common(),
            sections=sections,
            scaling=scaling,
            parts=parts,
            choices=_choices(points),
            configurations=data["configurations"],
            published=PUBLISHED,
            published_ratio=published_ratio,
            published_source=SOURCE,
            published_caveat=CAVEAT,
            published_columns=columns(points),
            origins=origins(points),
            commands=Counter(filter(None, map(reproduce, points))).most_common(),
            kind_meanings=KIND_MEANINGS,
            regime_meanings=REGIME_MEANINGS,
            regime_labels=formatting.REGIME_LABELS,
            data=embed.compressed(data),
        )
    )


def page_environment(filters: dict[str, Callable[..., object]]) -> Environment:
    """Jinja's environment of the pages: everything is escaped but what `markup` lets through."""
    environment = Environment(
        loader=PackageLoader("longreel.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The figures and the data are made by our own code and hold no markup of the records': escaped where they are made.
    environment.filters |= filters | {"markup": Markup}
    return environment


def _choices(points: Sequence[Record]) -> list[tuple[str, str, list[str]]]:
    """(field, name, values) of each filter that has something to choose from."""
    fields = (
        ("kind", "Kind", get_args(Kind)),
        ("regime", "Regime", get_args(Regime)),
        ("strategy", "Strategy", ()),
        ("policy", "Policy", ()),
        ("status", "Status", get_args(Status)),
    )
    found = []
    for field, name, order in fields:
        values = {str(getattr(r, field)) for r in points}
        found.append((field, name, [v for v in order if v in values] or sorted(values)))
    return found
