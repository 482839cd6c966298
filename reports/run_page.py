"""A training run's page: curves of its metrics.jsonl, what it was, and clips sampled from it; one file, no network."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from longreel.reports.svg import PALETTE, inline

METRICS = "metrics.jsonl"
# Figures that get a curve, if the run has them: (key, title, logarithmic).
_CURVES = (
    ("loss", "Loss", False),
    ("tokens_per_s", "Throughput, tokens/s over all ranks", False),
    ("grad_norm", "Norm of the gradients", True),
    ("learning_rate", "Learning rate", False),
    ("mfu", "Model FLOPs utilisation", False),
    ("memory", "Memory of the fullest rank, bytes", False),
    ("loss_scale", "Loss scale", True),
)
# Embedded in the page, so not too large; players of others are a click away.
_MAX_CLIP_BYTES = 8 << 20
_STYLE = """
:root{color-scheme:light dark}body{font-family:system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}
figure{margin:1.5rem 0}figcaption{font-weight:600;margin-bottom:.3rem}svg{width:100%;height:auto}
.clips{display:flex;flex-wrap:wrap;gap:1rem}video{image-rendering:pixelated;width:16rem;display:block}
table{border-collapse:collapse}td{padding:.1rem .8rem .1rem 0;vertical-align:top}pre{overflow-x:auto}
"""


def is_run(folder: Path) -> bool:
    """Whether a folder is the `out` of a training run."""
    return (folder / METRICS).is_file()


def write_run_page(run: Path, out: Path) -> Path:
    """Write run.html of a training run.

    Args:
        run: the run's `out` folder. out: folder of the page, created if needed.

    Returns:
        The page.

    Raises:
        ValueError: metrics.jsonl is damaged or empty. OSError: something cannot be read or written.
    """
    lines = read_metrics(run / METRICS)
    curves = [(key, title, log, _points(lines, key)) for key, title, log in _CURVES]
    figures = [_curve(points, key, title, log) for key, title, log, points in curves if points]
    clips = [_clip(path, run) for path in sorted(run.rglob("*.mp4")) if "demo" not in path.relative_to(run).parts]
    title = f"Training run {run.name}"
    page = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>',
        f"<h1>{escape(title)}</h1>",
        _summary(lines),
        *figures,
        f'<h2>Samples</h2><div class="clips">{"".join(clips)}</div>' if clips else "",
        _configuration(run),
        "</html>",
    ]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.html"
    path.write_text("\n".join(page), encoding="utf-8")
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that a crash cut off is left out.

    Raises:
        ValueError: no line, or one that is no JSON object with step and loss; names its number.
    """
    lines = []
    texts = path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(texts):
                break
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(line, dict) or not {"step", "loss"} <= line.keys():
            raise ValueError(f"{path}:{number}: not a line of a training run: it has no step and loss")
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: holds no line yet")
    return lines


def _points(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) where there is one: a figure that was not finite, such as the norm at an overflow, is null."""
    found = ((line["step"], line.get(key)) for line in lines)
    return [(step, value) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]


def _curve(points: Sequence[tuple[int, float]], key: str, title: str, log: bool) -> str:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    steps, values = zip(*points, strict=True)
    with pyplot.rc_context({"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(figsize=(9, 2.6))
        many = len(values) > 50
        axes.plot(steps, values, color=PALETTE[0], linewidth=0.8, alpha=0.4 if many else 1.0)
        if many:
            axes.plot(steps, _smoothed(values, len(values) // 25), color=PALETTE[0], linewidth=1.6)
        if log and min(values) > 0:
            axes.set_yscale("log")
        axes.set_xlabel("step")
        text = io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight")
        pyplot.close(figure)
    svg = inline(text.getvalue(), prefix=key, label=f"{title} against step")
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _smoothed(values: Sequence[float], width: int) -> list[float]:
    """Means over the last `width` values."""
    return [sum(values[max(0, i - width) : i + 1]) / (i + 1 - max(0, i - width)) for i in range(len(values))]


def _summary(lines: Sequence[dict[str, Any]]) -> str:
    last = lines[-1]
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
    rows = {"steps": last["step"], "last loss": loss}
    if rates := [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]:
        rows["median tokens/s"] = f"{sorted(rates)[len(rates) // 2]:,.0f}"
    if "skipped_steps" in last:
        rows["steps left out, gradients overflowed"] = last["skipped_steps"]
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{cells}</table>"


def _clip(path: Path, run: Path) -> str:
    name = escape(str(path.relative_to(run)))
    if path.stat().st_size > _MAX_CLIP_BYTES:
        return f"<figure><figcaption>{name}</figcaption>too large to be shown here</figure>"
    data = base64.b64encode(path.read_bytes()).decode()
    video = f'<video controls loop muted src="data:video/mp4;base64,{data}"></video>'
    return f"<figure><figcaption>{name}</figcaption>{video}</figure>"


def _configuration(run: Path) -> str:
    """The configuration that the newest checkpoint holds."""
    for path in sorted(run.glob("checkpoints/step-*/run.json"), reverse=True):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))["config"]
        except (ValueError, KeyError, TypeError):
            continue
        return f"<h2>Configuration</h2><pre>{escape(json.dumps(config, indent=1))}</pre>"
    return ""
