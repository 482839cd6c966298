"""Which strategy wins, by length, link, GPUs and regime: `python bench/crossover.py --out out/crossover.svg`."""

from __future__ import annotations

import itertools
import json
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
from longreel.reports.records import Regime

GIGA = 1e9
# Nearer than this, the map says so: the model is not that exact.
CLOSE = 0.01
_COLORS = {"local": "#9e9e9e", "ulysses": "#1f77b4", "fastseq": "#d95f02", "ring": "#2ca02c", "usp": "#9467bd"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossoverConfig:
    """Draw the map of the strategy that the planner takes. Every cell is predicted.

    Args:
        tokens: lengths of one sample. links: GB/s per direction between two GPUs. gpus: numbers of GPUs.
        regimes: full, text_only. target: GPU whose other figures count. model: preset of the DiT.
        samples: of one step over all GPUs; fewer than GPUs make sequence parallelism a must.
        out: .svg or .png file; cells go beside it as .json.
    """

    tokens: tuple[int, ...] = (8_192, 65_536, 262_144, 819_200)
    links: tuple[float, ...] = (25, 50, 200, 450)
    gpus: tuple[int, ...] = (2, 4, 8)
    regimes: tuple[Regime, ...] = ("full", "text_only")
    target: str = "H800"
    model: str = "dit-xl-2"
    samples: int = 1
    out: Path = Path("out/crossover.svg")


def cells(config: CrossoverConfig) -> list[dict[str, Any]]:
    """One dict per cell: regime, gpus, tokens, link; then strategy, name, policy and `ahead` (part by which it is
    faster than the best of another strategy), or strategy None where nothing fits."""
    found = []
    host = 128 * 2**30
    for regime, gpus, tokens in itertools.product(config.regimes, config.gpus, config.tokens):
        model = TargetGrid(regime=regime, seq_lens=(tokens,), model_preset=config.model).dit
        for link in config.links:
            gpu = replace(get_profile(config.target), link_bytes_s=link * GIGA)
            setting = Setting(
                model=model,
                world_size=gpus,
                grid=grid_of(tokens),
                samples=config.samples,
                limit_bytes=gpu.usable_bytes,
                host_limit_bytes=host,
                gpu=gpu,
            )
            cell: dict[str, Any] = {"regime": regime, "gpus": gpus, "tokens": tokens, "link_gb_s": link}
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
    """The cells as a picture: a panel for each regime and number of GPUs, pale where another strategy is within 1 %.

    Args:
        found: as cells() gives them. out: .svg or .png file.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    panels = sorted({(cell["regime"], cell["gpus"]) for cell in found})
    lengths, links = (sorted({cell[name] for cell in found}) for name in ("tokens", "link_gb_s"))
    figure = Figure(figsize=(2 + 1.3 * len(lengths), (0.9 + 0.45 * len(links)) * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (regime, gpus) in zip(axes, panels, strict=True):
        for cell in found:
            if (cell["regime"], cell["gpus"]) != (regime, gpus):
                continue
            x, y = lengths.index(cell["tokens"]), links.index(cell["link_gb_s"])
            close = cell["ahead"] is not None and cell["ahead"] < CLOSE
            color = _COLORS.get(cell["strategy"], "#ffffff")
            axis.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white", alpha=0.35 if close else 0.85))
            margin = "" if cell["ahead"] is None else f"\n+{100 * cell['ahead']:.1f} %"
            axis.text(x + 0.5, y + 0.5, f"{cell['name']}{margin}", ha="center", va="center", fontsize=6)
        axis.set(xlim=(0, len(lengths)), ylim=(0, len(links)))
        axis.set_xticks([i + 0.5 for i in range(len(lengths))], [f"{n:,}" for n in lengths], fontsize=7)
        axis.set_yticks([i + 0.5 for i in range(len(links))], [f"{n:g} GB/s" for n in links], fontsize=7)
        axis.set_title(f"{regime}, {gpus} GPUs, predicted; + over the best other strategy, pale below 1 %", fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 after one `error:` line on stderr."""
    try:
        config = parse_arguments(
            CrossoverConfig, sys.argv[1:] if arguments is None else arguments, prog="python bench/crossover.py"
        )
        if config.out.suffix not in (".svg", ".png"):
            raise ValueError(f"out must be an .svg or .png file, got {config.out}")
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
