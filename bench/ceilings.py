"""What a machine can do at best, measured: a matrix product and a copy, sustained, with clocks, power and energy.

The burst, which is the ops' roofline, is timed as they are, by run_case. Sustained runs back to back for seconds:
clocks and power settle, and the energy counter can be trusted.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch

from longreel.bench import op_gate
from longreel.bench.nvml import Monitor
from longreel.bench.op_run import CaseRequest
from longreel.bench.ops import OPS, make_inputs
from longreel.bench.timing import Work, sustain
from longreel.reports.op_records import OpRecord

BURST, SUSTAINED = "burst", "sustained"
PROVIDER = "eager"


def run_sustained(request: CaseRequest, seconds: float) -> OpRecord:
    """One roofline case over and over for this long, as a record labelled `sustained`.

    Args:
        request: a case of `matmul` or `clone`. seconds: the window; more than two for its energy.
    """
    request = replace(request, label=SUSTAINED)
    device = torch.device(request.device)
    context = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with context, Monitor(device) as monitor:
        inputs = make_inputs(request.case, device)
        function = OPS[request.case.op].plain(request.case)
        verdict = op_gate.check(request.case, function, inputs, is_ours=False)
        if verdict.reason is not None:
            return request.record(PROVIDER, "forward", "wrong", reason=verdict.reason)
        leaves = list(inputs.values())
        found = sustain(Work(run=lambda _: function(*leaves)), seconds, device=device, monitor=monitor)
    return request.record(
        PROVIDER,
        "forward",
        "ok",
        median_s=1 / found.rate,
        energy_j=found.energy_j,
        readings=found.readings,
        error=verdict.error,
        allowed=verdict.allowed,
        provenance={"window_s": found.seconds, "calls": found.calls},
    )
