"""Whether losses, gradients and parameters stay finite, noted on the device, and what is kept when they do not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longreel.parallel.comm import all_gather
from longreel.parallel.engine import local_part

_LOSS, _GRADIENTS, _PARAMETERS = range(3)
_NAMES = ("the loss is", "the gradient norm is", "the parameters are")
# What is not finite without any scaling is not for smaller scales to mend: halving them would go on for ever.
MIN_LOSS_SCALE = 1.0


class FiniteWatch:
    """Notes the first step whose loss or gradients were not finite; nothing waits for the device until check().

    Args:
        group: name of the group of all ranks. device: of the tensors noted.
    """

    def __init__(self, group: str, device: torch.device) -> None:
        self._group = group
        self._first = torch.full((2,), math.inf, dtype=torch.float64, device=device)
        self._skipped = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def skipped_steps(self) -> int:
        """Steps left out since the start because gradients overflowed under a scaled loss; waits for the device."""
        return int(self._skipped)

    def note(self, step: int, loss: Tensor, norm: Tensor, *, loss_scale: Tensor | None = None) -> None:
        """Look at a step.

        Args:
            step: from 1. loss: this rank's share. norm: of all gradients.
            loss_scale: after the step, where the loss is scaled: gradients that overflow are what it is for, down to
                MIN_LOSS_SCALE, and are counted instead.
        """
        good = torch.stack([loss.detach().double().isfinite(), norm.detach().double().isfinite()])
        if loss_scale is not None:
            overflowed = ~good[_GRADIENTS] & (loss_scale >= MIN_LOSS_SCALE)
            self._skipped += overflowed.double()
            good[_GRADIENTS] |= overflowed
        self._first = torch.minimum(self._first, torch.where(good, math.inf, float(step)))

    @torch.no_grad()
    def check(self, step: int, parameters: Iterable[nn.Parameter] = ()) -> tuple[int, str, list[int]] | None:
        """What any rank has met first, the same on every rank; None where all is finite.

        Args:
            step: done. parameters: to look at, too.

        Returns:
            (step, "the loss is not finite at step 3", ranks that met it).
        """
        finite = [local_part(p).isfinite().all() for p in parameters]
        held = torch.where(torch.stack(finite).all(), math.inf, float(step)) if finite else torch.tensor(math.inf)
        everyone = all_gather(torch.cat([self._first, held.to(self._first).reshape(1)]), self._group)
        first: list[float] = everyone.min(dim=0).values.tolist()
        if min(first) == math.inf:
            return None
        kind = first.index(min(first))
        ranks = [rank for rank, at in enumerate(everyone[:, kind].tolist()) if at == first[kind]]
        return int(first[kind]), f"{_NAMES[kind]} not finite at step {int(first[kind])}", ranks


def write_bad_batch(
    out: Path, step: int, what: str, ranks: list[int], describe: Callable[[int], list[dict[str, Any]]]
) -> Path:
    """Keep which samples a step was made of, for a look at the data; the file's path.

    Args:
        out: folder of the run. step: from 1. what: is not finite. ranks: on which it was seen.
        describe: see Batches.
    """
    path = out / f"bad-batch-{step:06d}.json"
    text = json.dumps({"step": step, "what": what, "ranks": ranks, "samples": describe(step - 1)}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return path
