"""The planner's answer for people: the choice, the runners-up and by how much, what does not fit and why."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from longreel.bench.plan_answer import GiB, PlanConfig, cost_of_million, flags
from longreel.parallel.predict.needs import Need
from longreel.parallel.predict.planner import Plan, Refused, spread_name

_SHOWN = 8


def print_plan(found: Plan, config: PlanConfig, console: Console | None = None) -> None:
    """Print the answer.

    Args:
        found: the plan. config: the question. console: where to; stdout if not given.
    """
    console = console or Console(highlight=False)
    profile, best = config.profile, found.best
    speed = found.tokens_per_s(best)
    assert speed is not None
    console.print(
        f"[bold]{spread_name(best.parallel)}, {_rest(best)}[/bold]   predicted, {config.gpus} x {profile.name}, "
        f"{config.tokens:,} tokens, {config.regime}, {config.model}",
        soft_wrap=True,
    )
    console.print(
        f"{speed[0]:,.0f} tokens/s ({speed[1]:,.0f} to {speed[2]:,.0f}), a step of {best.samples} "
        f"sample{'s' if best.samples > 1 else ''} in {best.seconds:.4g} s",
        soft_wrap=True,
    )
    host = f", {best.host_bytes / GiB:.1f} GiB of host memory" if best.host_bytes else ""
    console.print(
        f"{best.device_bytes / GiB:.1f} GiB a GPU{host}, of {profile.usable_bytes / GiB:.1f} GiB usable "
        f"({profile.memory_bytes / GiB:.0f} less the reserve)",
        soft_wrap=True,
    )
    if (cost := cost_of_million(speed[0], config)) is not None:
        console.print(f"{cost:.4g} for a million tokens at {config.price:g} a GPU and hour", soft_wrap=True)
    console.print(f"train.py {flags(best)}\n", soft_wrap=True)
    if found.runners_up:
        console.print(_runners_up(found, config))
    if found.refused:
        console.print(_refused(found))
    for name, reason in found.impossible:
        console.print(f"{name}: {reason}", soft_wrap=True)
    last = "Nothing here was measured; the interval covers the rates, not what the model leaves out."
    console.print(last, soft_wrap=True)


def _rest(one: Need | Refused) -> str:
    p = one.parallel
    tile = f", MLP tile {p.mlp_tile}" if p.mlp_tile else ""
    return f"{p.policy}{tile}, {p.engine.removeprefix('fsdp2-').replace('zero', 'ZeRO-')}"


def _runners_up(found: Plan, config: PlanConfig) -> Table:
    table = Table(title="best of every other strategy and degree", title_justify="left")
    for name in ("", "configuration", "tokens/s", "slower by", "GiB a GPU"):
        table.add_column(name, justify="left" if name in ("", "configuration") else "right", overflow="fold")
    if config.price is not None:
        table.add_column("a million tokens", justify="right", overflow="fold")
    best = found.tokens_per_s(found.best)
    assert best is not None
    for need in found.runners_up[:_SHOWN]:
        speed = found.tokens_per_s(need)
        assert speed is not None
        row = [
            spread_name(need.parallel),
            _rest(need),
            f"{speed[0]:,.0f}",
            f"{100 * (1 - speed[0] / best[0]):.2f} %",
            f"{need.device_bytes / GiB:.1f}",
        ]
        cost = cost_of_million(speed[0], config)
        table.add_row(*row, *([] if cost is None else [f"{cost:.4g}"]))
    return table


def _refused(found: Plan) -> Table:
    table = Table(title="what does not fit, and would have been faster or was the last resort", title_justify="left")
    for name in ("", "configuration", "needs", "of GiB"):
        table.add_column(name, justify="left" if name in ("", "configuration") else "right", overflow="fold")
    setting = found.setting
    # Of each spread the one that comes closest to fitting, of the chosen one all.
    shown: dict[str, Refused] = {}
    for one in found.refused:
        name = spread_name(one.parallel)
        if name == spread_name(found.best.parallel):
            shown[f"{name} {_rest(one)}"] = one
        elif name not in shown or one.device_bytes < shown[name].device_bytes:
            shown[name] = one
    for one in shown.values():
        needs = f"{'' if one.exact else 'at least '}{one.device_bytes / GiB:.1f}"
        limit = f"{setting.limit_bytes / GiB:.1f}"
        if one.host_bytes > setting.host_limit_bytes:
            needs, limit = f"{one.host_bytes / GiB:.1f} host", f"{setting.host_limit_bytes / GiB:.1f}"
        table.add_row(spread_name(one.parallel), _rest(one), needs, limit)
    return table
