"""One command for a Hopper GPU: validate, measure, tune, measure again: `python bench/campaign.py --out DIR`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longreel.bench import op_provenance
from longreel.bench.campaign_plans import hopper, rehearsal
from longreel.bench.campaign_steps import BUDGETS, RECORDS, STEPS, Campaign, interpreting
from longreel.bench.campaign_validate import gpu_parts, rehearsed_parts
from longreel.bench.console import prepare_folder
from longreel.bench.micro_options import check_device, names
from longreel.bench.micro_sweep import load, run_label
from longreel.data.command_line import parse_arguments
from longreel.parallel.workers import WorkerPool


@dataclass(frozen=True, kw_only=True, slots=True)
class CampaignConfig:
    """Validate the kernels on a GPU, measure its ceilings and the ops, tune, measure again; all within minutes.

    The same command goes on where it stopped: finished steps, cases and candidates are not run again.

    Args:
        out: folder of records.jsonl, ops.csv, report.html, tuning.json, campaign.json and the tests' logs.
        minutes: for all steps together.
        step: some of validate,ceilings,micro,tune,micro2,more,report; all if not given.
        rehearse: the same path on a CPU in under a minute, tiny sizes, Triton interpreted.
        device: torch device.
        retry_errors: try what failed before once more; otherwise its row stands.
        commit: the commit of this tree, for a copy that is no git checkout.
    """

    out: Path
    minutes: float = 9.0
    step: str | None = None
    rehearse: bool = False
    device: str = "cuda"
    retry_errors: bool = False
    commit: str | None = None

    def steps(self) -> tuple[str, ...]:
        """The steps to run, in their order; ValueError names the option and what would work."""
        if not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        if not self.rehearse:
            if not self.device.startswith("cuda"):
                raise ValueError(
                    f"device must be cuda or cuda:<index>, got {self.device!r}; --rehearse runs on the CPU"
                )
            check_device(self.device, "--rehearse runs the same path on the CPU")
        wanted = names("step", self.step, tuple(STEPS)) or tuple(STEPS)
        return tuple(step for step in STEPS if step in wanted)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 when a step failed; 2 after one `error:` line on stderr about a bad command; 130 when interrupted.
    """
    start = time.monotonic()
    command = sys.argv if arguments is None else ["bench/campaign.py", *arguments]
    try:
        config = parse_arguments(CampaignConfig, command[1:], prog="python bench/campaign.py")
        steps = config.steps()
        # Tests run in another folder than this process.
        folder = config.out.expanduser().resolve()
        prepare_folder(folder)
        if (folder / RECORDS).exists():
            load(folder / RECORDS)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    plan = rehearsal(rehearsed_parts()) if config.rehearse else hopper(gpu_parts(), device=config.device)
    with interpreting(plan.interpret), WorkerPool(1) as pool:
        campaign = Campaign(
            folder=folder,
            plan=plan,
            provenance=op_provenance.gather(command, torch.device(plan.device), commit=config.commit),
            pool=pool,
            run=run_label(),
            retry_errors=config.retry_errors,
            say=lambda text: print(text, flush=True),
        )
        try:
            return _run(campaign, steps, start, config.minutes)
        except KeyboardInterrupt:
            print(f"interrupted; records are in {campaign.records}, and the same command goes on", file=sys.stderr)
            return 130


def _run(campaign: Campaign, steps: Sequence[str], start: float, minutes: float) -> int:
    end = start + 60 * minutes
    scale = 60 * minutes / sum(BUDGETS.values())
    results = []
    for i, name in enumerate(steps):
        earlier = campaign.state().get(name, {})
        if earlier.get("status") == "done" and name != "report":
            results.append((name, "done before", 0.0, earlier["summary"]))
            continue
        # What the later steps are promised is kept for them.
        deadline = end - scale * sum(BUDGETS[later] for later in steps[i + 1 :])
        if len(steps) < len(STEPS):
            deadline = end
        budget = deadline - time.monotonic()
        print(f"== {name}: up to {max(0.0, budget):.0f} s", flush=True)
        began = time.monotonic()
        outcome = STEPS[name](campaign, deadline)
        seconds = time.monotonic() - began
        campaign.remember(name, outcome, seconds)
        results.append((name, outcome.status, seconds, outcome.summary))
    print("\n" + "\n".join(f"{name:9} {status:12} {seconds:6.1f} s  {what}" for name, status, seconds, what in results))
    unfinished = [name for name, status, _, _ in results if status == "partial"]
    if unfinished:
        print(f"unfinished: {', '.join(unfinished)}; run the same command again to go on")
    print(f"{time.monotonic() - start:.0f} s. Records: {campaign.records}, report: {campaign.folder / 'report.html'}")
    return 1 if any(status == "failed" for _, status, _, _ in results) else 0


if __name__ == "__main__":
    sys.exit(main())
