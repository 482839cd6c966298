"""Which strategy wins, by length, link, GPUs and regime: `python bench/crossover.py --out out/crossover.svg`."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longreel.bench.grids import TargetGrid
from longreel.data.command_line import parse_arguments
from longreel.parallel.predict.hardware import get_profile
from longreel.parallel.predict.needs import Setting
from longreel.parallel.predict.planner import plan, spread_name
from longreel.parallel.predict.predict import grid_of
from longreel.reports.crossover import CLOSE, COLORS, REGIMES
from longreel.reports.records import Regime

GIGA = 1e9
# Host memory of a GPU, for policy offload.
HOST_BYTES = 128 * 2**30
_SQUARE = 0.8, 0.42


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossoverConfig:
    """Draw the map of the strategy that the planner takes. Every cell is predicted.

    Args:
        tokens: lengths of one sample. links: GB/s per direction between two GPUs. gpus: numbers of GPUs.
        regimes: full, text_only. target: GPU whose other figures count: a name, or a TOML file. model: preset of the
            DiT.
        samples: of one step over all GPUs; fewer than GPUs make sequence parallelism a must.
        processes: that search at a time; the machine's cores if not given.
        out: .svg or .png file; cells go beside it as .json.
    """

    tokens: tuple[int, ...] = (8_192, 32_768, 131_072, 409_600, 819_200)
    links: tuple[float, ...] = (25, 50, 100, 200, 450)
    gpus: tuple[int, ...] = (2, 4, 8)
    regimes: tuple[Regime, ...] = ("full", "text_only")
    target: str = "H800"
    model: str = "dit-xl-2"
    samples: int = 1
    processes: int | None = None
    out: Path = Path("out/crossover.svg")

    def __post_init__(self) -> None:
        for name in ("tokens", "links", "gpus"):
            if any(not value > 0 for value in getattr(self, name)):
                raise ValueError(f"{name} must be positive, got {', '.join(map(str, getattr(self, name)))}")
        for name in ("samples", "processes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.out.suffix not in (".svg", ".png"):
            raise ValueError(f"out must be an .svg or .png file, got {self.out}")
        profile = get_profile(self.target)
        for gpus in self.gpus:
            profile.check_gpus(gpus)


def cells(config: CrossoverConfig) -> list[dict[str, Any]]:
    """One dict per cell: target, model, samples, regime, gpus, tokens, link; then strategy, name, policy and `ahead`
    (part by which it is faster than the best of another strategy), or strategy None where nothing fits."""
    columns = list(itertools.product([config], config.regimes, config.gpus, config.tokens))
    workers = min(config.processes or len(os.sched_getaffinity(0)), len(columns)) if sys.platform == "linux" else 1
    if workers == 1:
        return [cell for column in columns for cell in _column(column)]
    # Forked, they need not import torch again; nothing has run on its threads so far. The longest first.
    order = sorted(range(len(columns)), key=lambda i: (-columns[i][2], -columns[i][3]))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        found = dict(zip(order, pool.map(_column, [columns[i] for i in order], chunksize=1), strict=True))
    return [cell for i in range(len(columns)) for cell in found[i]]


def _column(place: tuple[CrossoverConfig, Regime, int, int]) -> list[dict[str, Any]]:
    """The cells of all links, whose configurations are run on shapes once."""
    config, regime, gpus, tokens = place
    target = get_profile(config.target)
    model = TargetGrid(regime=regime, seq_lens=(tokens,), model_preset=config.model).dit
    asked = {"target": target.label, "model": config.model, "samples": config.samples}
    found = []
    for link in config.links:
        gpu = replace(target, link_bytes_s=link * GIGA)
        setting = Setting(
            model=model,
            world_size=gpus,
            grid=grid_of(tokens),
            samples=config.samples,
            limit_bytes=gpu.usable_bytes,
            host_limit_bytes=HOST_BYTES,
            gpu=gpu,
        )
        cell: dict[str, Any] = asked | {"regime": regime, "gpus": gpus, "tokens": tokens, "link_gb_s": link}
        try:
            answer = plan(setting)
        except ValueError:
            found.append(cell | {"strategy": None, "name": "nothing fits", "policy": None, "ahead": None})
            continue
        best = answer.best
        others = [one for one in answer.runners_up if one.parallel.strategy != best.parallel.strategy]
        speed = [answer.tokens_per_s(one) for one in (best, *others[:1])]
        ahead = speed[0][0] / speed[1][0] - 1 if len(speed) > 1 and speed[0] and speed[1] else None
        names = {"strategy": best.parallel.strategy, "name": spread_name(best.parallel), "policy": best.policy}
        found.append(cell | names | {"ahead": ahead})
    return found


def draw(found: Sequence[Mapping[str, Any]], out: Path) -> None:
    """The cells as a picture: a panel for each number of GPUs and regime, pale where another strategy is within 1 %.

    Args:
        found: as cells() gives them. out: .svg or .png file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    gpus, regimes, lengths, links = (
        sorted({cell[name] for cell in found}) for name in ("gpus", "regime", "tokens", "link_gb_s")
    )
    width, height = _SQUARE[0] * len(lengths) + 0.9, _SQUARE[1] * len(links) + 0.7
    size = max(5.0, width * len(regimes)), height * len(gpus) + 0.8
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(gpus), len(regimes), squeeze=False)
    for row, num_gpus in enumerate(gpus):
        for column, regime in enumerate(regimes):
            here = [cell for cell in found if (cell["gpus"], cell["regime"]) == (num_gpus, regime)]
            _panel(axes[row, column], here, lengths, links)
            axes[row, column].set_title(f"{num_gpus} GPUs, {REGIMES.get(regime, regime)}", fontsize=8)
    one = found[0]
    figure.suptitle(
        f"PREDICTED: the fastest strategy, {one.get('model')} on {one.get('target')}, {one.get('samples')} sample(s) a "
        "step\nby tokens and link; + over the best other strategy, pale below 1 %",
        fontsize=9,
    )
    shown = [name for name in COLORS if any(cell["strategy"] == name for cell in found)]
    handles = [Patch(facecolor=COLORS[name], label=name) for name in shown]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Letters stay letters, and the same cells make the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "crossover"}):
        figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)


def _panel(axis: Any, here: Sequence[Mapping[str, Any]], lengths: Sequence[int], links: Sequence[float]) -> None:
    from matplotlib.patches import Rectangle

    for cell in here:
        x, y = lengths.index(cell["tokens"]), links.index(cell["link_gb_s"])
        close = cell["ahead"] is not None and cell["ahead"] < CLOSE
        color = COLORS.get(cell["strategy"], "#ffffff")
        axis.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white", alpha=0.3 if close else 0.75))
        margin = "" if cell["ahead"] is None else f"\n+{100 * cell['ahead']:.1f} %"
        axis.text(x + 0.5, y + 0.5, f"{cell['name']}{margin}", ha="center", va="center", fontsize=6)
    axis.set(xlim=(0, len(lengths)), ylim=(0, len(links)))
    axis.set_xticks([i + 0.5 for i in range(len(lengths))], [f"{n:,}" for n in lengths], fontsize=7)
    axis.set_yticks([i + 0.5 for i in range(len(links))], [f"{n:g} GB/s" for n in links], fontsize=7)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 after one `error:` line on stderr."""
    try:
        config = parse_arguments(
            CrossoverConfig, sys.argv[1:] if arguments is None else arguments, prog="python bench/crossover.py"
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
            found = cells(config)
        draw(found, config.out)
        config.out.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{config.out}: {len(found)} cells")
    return 0


if __name__ == "__main__":
    sys.exit(main())
