"""One op case in a worker: every provider through the gate, then all that passed timed against each other.

Whatever becomes of a provider is a record: `ok`, `oom`, `wrong`, `skipped` or `error` here; what breaks the device or
hangs ends the worker and becomes `error` in micro_sweep.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longreel.bench import op_gate, providers
from longreel.bench.nvml import Monitor
from longreel.bench.op_provenance import device_words
from longreel.bench.ops import OPS, OpCase, Outputs, make_inputs, work_of
from longreel.bench.provenance import stamped
from longreel.bench.tiles import Tiles, use_tiles
from longreel.bench.timing import Timing, TimingRule, Work, clock_for, measure
from longreel.reports import store
from longreel.reports.op_records import OpRecord
from longreel.reports.records import Status
from longreel.reports.turns import compare

# A first run of this many seconds is not repeated to see its memory without compilation.
_LONG_S = 3.0
AT, MADE = "at.txt", "made.jsonl"
# In the provenance of what was left out for its time: with more time it is measured after all.
LEFT_OUT = "left_out_for_time"


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseRequest:
    """What a worker is asked for.

    Args:
        case: the op and shape. providers: names, ours and peers. directions: some of forward, backward, both.
        rule: timing. device: torch device.
        run: label of the run; records with one label may be compared.
        label: which pass of a campaign, part of the records' keys.
        tiles: attention tile constants that replace the built-in ones.
        not_again: provider -> why it is not tried again. left_out: provider -> why there is no time for it.
        samples: of each direction where the case takes long, rule.min_samples or fewer; None: as the rule says.
        long: providers of which a call takes seconds: they are not run more often than has to be.
        deadline: time.monotonic() after which nothing is started any more; what was measured by then is returned.
        provenance: of every record, without its time.
        limit_s: seconds for the gate of one provider, compilation included, and for timing one direction; past them
            the process is ended. None: no limit.
        trail: folder where the worker leaves what outlives it: AT names the provider at the gate, MADE holds the
            records of the directions that are done.
    """

    case: OpCase
    providers: tuple[str, ...]
    directions: tuple[str, ...]
    rule: TimingRule
    device: str
    run: str
    label: str = ""
    tiles: Tiles = ()
    not_again: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    samples: int | None = None
    long: tuple[str, ...] = ()
    deadline: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    limit_s: float | None = None
    trail: Path | None = None

    @property
    def time_is_up(self) -> bool:
        """Whether the deadline has come."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def possible_directions(self) -> tuple[str, ...]:
        """The directions that the op has."""
        return self.directions if OPS[self.case.op].differentiable else ("forward",)

    def record(self, provider: str, direction: str, status: Status, **outcome: Any) -> OpRecord:
        """The record of one provider and direction with what became of it."""
        config = {"timing": asdict(self.rule), "label": self.label, "tiles": [list(row) for row in self.tiles]}
        provenance = stamped(dict(self.provenance), **outcome.pop("provenance", {}))
        return OpRecord(
            kind="measured",
            status=status,
            op=self.case.op,
            direction=direction,
            provider=provider,
            is_ours=provider in providers.kernel_providers(self.case.op),
            dtype=self.case.dtype,
            device=device_words(torch.device(self.device)),
            shape=self.case.shape(),
            run=self.run,
            config=config,
            provenance=provenance,
            **work_of(self.case, direction),
            **outcome,
        )

    def records(self, provider: str, status: Status, reason: str, **outcome: Any) -> list[OpRecord]:
        """Records of every direction of a provider that has no figure."""
        return [self.record(provider, d, status, reason=reason, **outcome) for d in self.possible_directions]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Passed:
    """A provider that passed the gate. memory: see OpRecord."""

    function: Callable[..., Outputs]
    verdict: op_gate.Verdict
    memory: dict[str, int]


def run_case(request: CaseRequest) -> list[OpRecord]:
    """Gate and time every provider of a request; records in the order of providers, then directions.

    Directions that the deadline leaves no time for have no records.
    """
    device = torch.device(request.device)
    context = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with context, Monitor(device) as monitor, use_tiles(request.tiles):
        # Compiled graphs of earlier cases count towards torch.compile's limit of recompilations.
        torch.compiler.reset()
        records: list[OpRecord] = []
        try:
            inputs = make_inputs(request.case, device)
        except torch.OutOfMemoryError as error:
            return [r for name in request.providers for r in request.records(name, "oom", _first_line(error))]
        passed: dict[str, _Passed] = {}
        for name in request.providers:
            if request.time_is_up:
                return []
            with _limited(request, name):
                found = _gate(request, name, inputs)
            if isinstance(found, _Passed):
                passed[name] = found
            else:
                records += found
        done: list[str] = []
        for direction in request.possible_directions:
            if request.time_is_up:
                break
            done.append(direction)
            with _limited(request, ""):
                records += _time_direction(request, direction, passed, inputs, monitor)
            if request.trail is not None:
                for record in records:
                    if record.direction == direction:
                        store.append(request.trail / MADE, record)
    place = {name: i for i, name in enumerate(request.providers)}
    records = [r for r in records if r.direction in done]
    return sorted(records, key=lambda r: (place[r.provider], request.possible_directions.index(r.direction)))


@contextmanager
def _limited(request: CaseRequest, provider: str) -> Iterator[None]:
    """Says on the trail who is at the gate, and ends this process when the block outlives the request's limit."""
    if request.trail is not None:
        (request.trail / AT).write_text(provider)
    if request.limit_s is None:
        yield
        return
    # The signal's default action is the kernel's: a call that never returns to Python does not hold it up.
    signal.setitimer(signal.ITIMER_REAL, request.limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def failed_status(reason: str) -> Status:
    """`oom` or `error`, by what an exception says."""
    return "oom" if "OutOfMemoryError" in reason or "can't allocate memory" in reason else "error"


def _gate(request: CaseRequest, name: str, inputs: Mapping[str, Tensor]) -> _Passed | list[OpRecord]:
    device = next(iter(inputs.values())).device
    on_cuda = device.type == "cuda"
    if name in request.not_again:
        return request.records(name, "skipped", request.not_again[name])
    if name in request.left_out:
        return request.records(name, "skipped", request.left_out[name], provenance={LEFT_OUT: True})
    try:
        function = providers.build(request.case, name, device)
    except providers.Unavailable as error:
        return request.records(name, "skipped", str(error))
    memory: dict[str, int] = {}
    try:
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
            memory["inputs"] = sum(t.numel() * t.element_size() for t in inputs.values())
            if name not in request.long:
                memory |= _peak(request.case, function, inputs)
        before = torch.cuda.memory_allocated() if on_cuda else 0

        def ran() -> None:
            if on_cuda and name in request.long:
                memory.update(_peak_since(before))

        is_ours = name in providers.kernel_providers(request.case.op)
        verdict = op_gate.check(request.case, function, inputs, is_ours=is_ours, ran=ran)
    except torch.OutOfMemoryError as error:
        return request.records(name, "oom", _first_line(error), memory=memory)
    except torch.AcceleratorError:
        raise
    except (RuntimeError, ValueError) as error:
        if on_cuda:
            # Raises where the device is of no use to this process any more, as Triton's own errors do not say.
            torch.cuda.synchronize(device)
        reason = f"{type(error).__name__}: {_first_line(error)}"
        return request.records(name, failed_status(reason), reason, memory=memory)
    finally:
        if on_cuda:
            torch.cuda.empty_cache()
    if verdict.reason is not None:
        outcome = {"error": verdict.error, "allowed": verdict.allowed, "memory": memory}
        return request.records(name, "wrong", verdict.reason, **outcome)
    return _Passed(function=function, verdict=verdict, memory=memory)


def _peak(case: OpCase, function: Callable[..., Outputs], inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of one forward and backward: `allocated` beside what was there, `reserved`, and used of the `device`."""
    work = works_of(case, function, inputs)["both" if OPS[case.op].differentiable else "forward"]
    # The incoming gradients, made in the first run, are of the backward.
    before, start = torch.cuda.memory_allocated(), time.monotonic()
    work.run(None)
    torch.cuda.synchronize()
    # The first run may try out variants; where it takes long, a second one costs more than it tells.
    if time.monotonic() - start < _LONG_S:
        torch.cuda.reset_peak_memory_stats()
        work.run(None)
    return _peak_since(before)


def _peak_since(before: int) -> dict[str, int]:
    """Peak since the statistics were reset, when `before` bytes were allocated."""
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    free, total = torch.cuda.mem_get_info()
    return {"allocated": peak, "reserved": torch.cuda.max_memory_reserved(), "device": total - free}


def works_of(case: OpCase, function: Callable[..., Outputs], inputs: Mapping[str, Tensor]) -> dict[str, Work]:
    """What is timed of a provider, by direction. Forward is the training one: it keeps what backward needs."""
    leaves = list(inputs.values())
    grads_of = [leaf for leaf in leaves if leaf.requires_grad]
    douts: list[Tensor] = []

    def forward(_: Any) -> Outputs:
        # Outputs beyond the definition's, such as an lse, get no gradient.
        return function(*leaves)

    def graph() -> tuple[Outputs, list[Tensor]]:
        outs = function(*leaves)
        if not douts:
            count = len(OPS[case.op].row_dims) - len(leaves) if OPS[case.op].row_dims else 1
            douts.extend(op_gate.incoming(outs[:count]))
        return outs[: len(douts)], douts

    def backward(state: tuple[Outputs, list[Tensor]]) -> Sequence[Tensor]:
        return torch.autograd.grad(state[0], grads_of, state[1])

    return {
        "forward": Work(run=forward),
        # A graph is used once: compiled backwards give their buffers away.
        "backward": Work(run=backward, prepare=graph),
        "both": Work(run=lambda _: backward(graph())),
    }


def _time_direction(
    request: CaseRequest,
    direction: str,
    passed: Mapping[str, _Passed],
    inputs: Mapping[str, Tensor],
    monitor: Monitor,
) -> list[OpRecord]:
    device = torch.device(request.device)
    records: list[OpRecord] = []
    remaining: dict[str, _Passed] = {}
    for name, found in passed.items():
        other = providers.same_as(name, direction)
        if other in passed:
            records.append(request.record(name, direction, "skipped", reason=f"its {direction} is that of {other}"))
        else:
            remaining[name] = found
    timings: dict[str, Timing] = {}
    clock = clock_for(device)
    while remaining and not timings:
        works = {
            name: replace(works_of(request.case, p.function, inputs)[direction], warm_up=name not in request.long)
            for name, p in remaining.items()
        }
        try:
            timings = measure(works, clock=clock, rule=_rule(request), monitor=monitor)
        except torch.OutOfMemoryError as error:
            # Together with the others' buffers; the one that needs most goes.
            largest = max(remaining, key=lambda name: remaining[name].memory.get("allocated", 0))
            records.append(request.record(largest, direction, "oom", reason=_first_line(error)))
            del remaining[largest]
    peers = {name: t.median_s for name, t in timings.items() if name not in providers.kernel_providers(request.case.op)}
    best_peer = min(peers, key=peers.__getitem__, default=None)
    for name, timing in timings.items():
        verdict = passed[name].verdict
        comparison: dict[str, Any] = {}
        if best_peer is not None and name not in peers:
            ratio = compare(timing.samples_s, timings[best_peer].samples_s)
            comparison = {"provider": best_peer, "verdict": ratio.verdict} | asdict(ratio)
        shown = [
            key for key in verdict.error if direction == "both" or key.startswith("d") == (direction == "backward")
        ]
        records.append(
            request.record(
                name,
                direction,
                "ok",
                samples_s=timing.samples_s,
                median_s=statistics.median(timing.samples_s),
                interval_s=timing.interval_s,
                host_s=timing.host_s,
                error={key: verdict.error[key] for key in shown},
                allowed={key: verdict.allowed[key] for key in shown},
                comparison=comparison,
                readings=timing.readings,
                memory=passed[name].memory,
                provenance={"warm_up": timing.warm_up, "stopped_by": timing.stopped_by},
            )
        )
    return records


def _rule(request: CaseRequest) -> TimingRule:
    """The timing rule within the time that there is; records keep the request's, which is part of their key."""
    rule = request.rule
    if request.samples is not None and request.samples < rule.min_samples:
        rule = replace(rule, min_samples=request.samples, max_samples=request.samples)
    if request.deadline is not None:
        left = max(0.0, request.deadline - time.monotonic())
        rule = replace(rule, wall_cap_s=min(rule.wall_cap_s, left))
    return rule


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
