"""The command that makes one record again: a sweep of a single point, everything that tells it from others said."""

from __future__ import annotations

import shlex

from longreel.bench.cases import Point
from longreel.bench.grids import preset_of
from longreel.bench.provenance import without_machine


def reproduce(point: Point) -> str:
    """The command line; `parse` of its arguments resolves to a sweep of this one point."""
    return shlex.join(["python", "bench/sweep.py", *arguments(point)])


def arguments(point: Point) -> list[str]:
    """What follows the program's name."""
    p = point.parallel
    options: dict[str, object] = {
        "preset": "point",
        "mode": point.kind,
        "seq-lens": point.seq_len,
        "gpus" if point.kind != "measured" or point.device_type == "cuda" else "ranks": point.num_devices,
        "regimes": point.regime,
        "layouts": point.model.cross_layout,
        "conditioning": point.model.conditioning,
        "policies": p.policy,
        "engines": p.engine,
        "attentions": p.attention_provider,
        "batches": point.batch_per_group,
    }
    if point.peer is not None:
        options |= {"strategies": "none", "peers": point.peer, "sp-degrees": p.sp_degree}
    else:
        options["strategies"] = p.strategy
        if p.strategy != "local":
            options["sp-degrees"] = p.sp_degree
    if p.head_chunks is not None:
        options["head-chunks"] = p.head_chunks
    if p.mlp_tile is not None:
        options["mlp-tiles"] = p.mlp_tile
    if point.target is not None:
        options["target"] = without_machine(point.target)
    name = preset_of(point.model)
    if name is not None:
        options["model"] = name
    else:
        m = point.model
        options |= {"depth": m.depth, "hidden-size": m.hidden_size, "num-heads": m.num_heads}
    return [f"--{option}={value}" for option, value in options.items()] + ["--no-baseline"]
