"""The time plan of a campaign on one Hopper GPU: seconds of each step by stated rates, before anything has run.

`python -m longreel.bench.campaign_times` prints it as the table of docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longreel.bench.campaign_plans import CampaignPlan, hopper
from longreel.bench.campaign_steps import BUDGETS
from longreel.bench.campaign_validate import PROCESSES
from longreel.bench.micro_sweep import MicroPlan
from longreel.bench.op_estimate import Rates, fit
from longreel.bench.ops import OpCase
from longreel.bench.tiles import candidates, is_row_kernel, listed_width
from longreel.bench.tune_plans import TunePlan
from longreel.kernels.triton_attention_tuning import length_class

# Assumed: GPU tests that run at a time, in parallel (most of it compilation), and those that run one by one.
NUM_TESTS, TEST_S = 330, 2.0
NUM_LARGE_TESTS, LARGE_TEST_S = 12, 4.0
# Starting Python, importing torch, making a CUDA context, collecting: once per pytest run and worker.
_START_S = 8.0
# A candidate's compilation, gate and samples; the decision about the best one is timed without compiling.
_CANDIDATE_S, _ROW_CANDIDATE_S, _DECISION_S = 2.2, 1.2, 1.0
_REPORT_S = 5.0
# Peers that the machines known to us do not have.
_NOT_INSTALLED = ("flash-attn-2", "flash-attn-3", "flash-attn-4", "liger")


class _Planned(Rates):
    """Assumed rates; what an earlier case has compiled is not compiled again."""

    def __init__(self) -> None:
        super().__init__((), "", assume=True)
        self._compiled: set[tuple[str, str, int]] = set()

    def is_new(self, case: OpCase, provider: str) -> bool:
        return (case.op, provider, case.head_dim) not in self._compiled

    def is_missing(self, case: OpCase, provider: str) -> bool:
        return provider in _NOT_INSTALLED

    def seconds_of(self, plans: Iterable[MicroPlan]) -> float:
        """All cases of some plans, one after the other."""
        total = 0.0
        for plan in plans:
            for case in plan.cases:
                names = plan.providers_for(case.op)
                total += fit(case, names, plan.directions_of(case), plan.rule, self, case_s=plan.case_s).seconds
                self._compiled.update((case.op, name, case.head_dim) for name in names)
        return total


def planned_seconds(plan: CampaignPlan) -> dict[str, float]:
    """Seconds of each step, by its name; of `more` all that it goes on with, which no nine minutes hold."""
    planned = _Planned()
    runs = len(plan.validate)
    validate = runs * _START_S + NUM_TESTS * TEST_S / PROCESSES + NUM_LARGE_TESTS * LARGE_TEST_S
    bursts = [
        MicroPlan(cases=plan.rooflines, providers=None, directions=("forward",), rule=plan.micro[0].rule, device="")
    ]
    found = {
        "validate": validate,
        "ceilings": _START_S + planned.seconds_of(bursts) + len(plan.rooflines) * (plan.sustained_s + 1.0),
        "micro": planned.seconds_of(plan.micro),
        "tune": _tuning(plan.tune),
        "micro2": planned.seconds_of(plan.micro_after),
        "more": _tuning(plan.tune_more) + planned.seconds_of(plan.micro_more),
        "report": _REPORT_S,
    }
    return {name: found[name] for name in BUDGETS}


def _tuning(plan: TunePlan) -> float:
    total = 0.0
    for target in plan.targets:
        width = listed_width(target.kernel, target.case.head_dim)
        others = candidates(target.kernel, width, length_class(target.case.seq_len))[1:]
        each = _ROW_CANDIDATE_S if is_row_kernel(target.kernel) else _CANDIDATE_S
        total += each * min(plan.most, len(others)) + _DECISION_S
    return total


def table(planned: dict[str, float]) -> list[str]:
    """The plan as a Markdown table."""
    rows = [f"| `{name}` | {seconds:.0f} | {BUDGETS[name]:.0f} |" for name, seconds in planned.items()]
    promised = [seconds for name, seconds in planned.items() if name != "more"]
    total = f"| all but `more` | {sum(promised):.0f} | {sum(BUDGETS.values()) - BUDGETS['more']:.0f} |"
    return ["| step | seconds planned | its share of nine minutes |", "| --- | --- | --- |", *rows, total]


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table."""
    from longreel.bench.campaign_validate import gpu_parts

    print("\n".join(table(planned_seconds(hopper(gpu_parts())))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
