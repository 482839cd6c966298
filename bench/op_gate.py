"""The correctness gate of an op: outputs and gradients of a provider against an fp32 or fp64 oracle, before any timing.

The oracle fits at any length. Ops that treat tokens apart are compared in blocks of tokens, the gradients of shared
inputs summed over them. Attention gets an incoming gradient that is zero but for some rows of queries spread over the
sequence, and is compared with attention of those rows to all keys: that is exact for the rows and for all of dk and dv.
Where it returns its log-sum-exp, that is compared too, and has an incoming gradient of its own at the same rows.
The bar is the project's: twice the error of the same computation in plain PyTorch of the same dtype, plus a floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longreel.bench import plain_ops
from longreel.bench.ops import DTYPES, OPS, OpCase
from longreel.bench.plain_ops import Outputs
from longreel.kernels.numerics import KERNEL_ERROR_FACTOR, relative_error

# Attention is compared row by row up to this length, and beyond it at NUM_ROWS rows.
MAX_FULL_ROWS = 2048
NUM_ROWS = 128
# Up to this length the gradients of attention are compared twice: with a gradient of its log-sum-exp and without.
MAX_ALONE = 131_072
# Elements of a token block in the oracle: bounds its fp64 temporaries to some hundred MB.
_BLOCK_ELEMENTS = 2**24
# Floors in units of eps, as the kernels' tests have them: one rounding of the result; attention rounds P as well.
_FLOOR = 1.0
_ATTENTION_FLOOR = 2.0
# Peers must compute the same thing, not meet our bar: torch.compile on a CPU, say, adds up tokens one after the other
# in fp32, at four times eager's error.
PEER_SLACK = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Relative error and what is allowed, by name: `out`, `out1` ..., of attention `lse`, and `d<input>`."""

    error: Mapping[str, float]
    allowed: Mapping[str, float]

    @property
    def reason(self) -> str | None:
        """Which result is too far off, None where all pass."""
        wrong = [name for name, error in self.error.items() if not error <= self.allowed[name]]
        if not wrong:
            return None
        worst = max(wrong, key=lambda name: self.error[name] / self.allowed[name])
        return f"{worst} is off by {self.error[worst]:.2e}, allowed {self.allowed[worst]:.2e}"


def check(
    case: OpCase,
    function: Callable[..., Outputs],
    inputs: Mapping[str, Tensor],
    *,
    is_ours: bool,
    seed: int = 0,
    ran: Callable[[], None] = lambda: None,
) -> Verdict:
    """Run a provider once, forward and backward, and compare.

    Args:
        case: the case. function: from providers.build. inputs: from make_inputs.
        is_ours: hold it to the project's bar; a peer is allowed PEER_SLACK times as much.
        seed: of the incoming gradients. ran: called when forward and backward are through, before the oracle.
    """
    op = OPS[case.op]
    leaves = list(inputs.values())
    outs = function(*leaves)
    names = [f"out{i}" if i else "out" for i in range(len(outs))]
    if not op.row_dims:
        verdict = _check_attention(case, outs, inputs, seed, ran)
    elif not op.differentiable:
        ran()
        verdict = _check_rows(case, inputs, [out.detach() for out in outs], [], [], names)
    else:
        douts = incoming(outs, seed=seed)
        grads = torch.autograd.grad(outs, leaves, douts)
        ran()
        verdict = _check_rows(case, inputs, [out.detach() for out in outs], grads, douts, names)
    if is_ours:
        return verdict
    return replace(verdict, allowed={name: PEER_SLACK * value for name, value in verdict.allowed.items()})


def incoming(outs: Sequence[Tensor], *, seed: int = 0) -> list[Tensor]:
    """Random incoming gradients of outputs."""
    generator = torch.Generator(outs[0].device).manual_seed(seed + 1)
    return [torch.randn(o.shape, generator=generator, device=o.device, dtype=o.dtype) for o in outs]


def _check_attention(
    case: OpCase, outs: Outputs, inputs: Mapping[str, Tensor], seed: int, ran: Callable[[], None]
) -> Verdict:
    outs = outs[:2]
    rows = _chosen_rows(case.seq_len, outs[0].device)
    # Zero but at the chosen rows; an lse is [B, H, S].
    douts = [torch.zeros_like(out) for out in outs]
    for dim, dense, dout in zip((1, 2), incoming(outs, seed=seed), douts, strict=False):
        dout.index_copy_(dim, rows, dense.index_select(dim, rows))
    leaves = list(inputs.values())
    # What is timed has no gradient of lse: it is held alone as well, where a backward takes no seconds.
    alone = [1] if len(outs) == 2 and case.seq_len <= MAX_ALONE else []
    found = {
        count: torch.autograd.grad(outs[:count], leaves, douts[:count], retain_graph=count < len(outs))
        for count in (*alone, len(outs))
    }
    ran()
    qkv = [t.detach() for t in (leaves if len(leaves) == 3 else leaves[0].unbind(2))]
    error: dict[str, float] = {}
    allowed: dict[str, float] = {}
    for count, grads in found.items():
        verdict = _compare_rows(case, [out.detach() for out in outs], grads, qkv, rows, douts[:count])
        for name, value in verdict.error.items():
            # Of two the worse one counts.
            if name not in error or value / verdict.allowed[name] > error[name] / allowed[name]:
                error[name], allowed[name] = value, verdict.allowed[name]
    return Verdict(error=error, allowed=allowed)


def _compare_rows(
    case: OpCase,
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    qkv: Sequence[Tensor],
    rows: Tensor,
    douts: Sequence[Tensor],
) -> Verdict:
    """Outputs at the chosen rows and the gradients that these have, against the oracle."""
    dtype = DTYPES[case.dtype]
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    hidden = _hidden_keys(case, rows)
    exact, eager = (_rows_of_attention(qkv, rows, hidden, douts, computed_in) for computed_in in (wide, dtype))
    dq, dk, dv = grads if len(grads) == 3 else grads[0].unbind(2)
    got = {"out": outs[0][:, rows], "dq": dq[:, rows], "dk": dk, "dv": dv}
    # A dq beyond the chosen rows must be zero, and whatever the other rows hold a number.
    dq[:, rows] = 0
    strays = {"out": not outs[0].isfinite().all(), "dq": bool(dq.any())}
    if len(outs) == 2:
        got["lse"] = outs[1][:, :, rows]
        strays["lse"] = not outs[1].isfinite().all()
    # dq and dk of a single key are zero but for rounding: they are measured against dv.
    floor = torch.linalg.vector_norm(exact["dv"]).item()
    error, allowed = {}, {}
    for name, value in got.items():
        least = floor if name.startswith("d") else 0.0
        error[name] = math.inf if strays.get(name) else relative_error(value, exact[name], least)
        allowed[name] = KERNEL_ERROR_FACTOR * relative_error(eager[name], exact[name], least)
        allowed[name] += _ATTENTION_FLOOR * torch.finfo(dtype).eps
    return Verdict(error=error, allowed=allowed)


def _chosen_rows(seq_len: int, device: torch.device) -> Tensor:
    """All rows, or the first, the last and others anywhere between, ascending."""
    if seq_len <= MAX_FULL_ROWS:
        return torch.arange(seq_len, device=device)
    generator = torch.Generator().manual_seed(seq_len)
    inner = torch.randperm(seq_len - 2, generator=generator)[: NUM_ROWS - 2] + 1
    ends = torch.tensor([0, seq_len - 1])
    return torch.cat([ends, inner]).sort().values.to(device)


def _hidden_keys(case: OpCase, rows: Tensor) -> Tensor | None:
    """Keys [rows, T] of other clips than the query's; None where it sees all."""
    if case.op != "attention_clips":
        return None
    ends = torch.tensor([end for _, end in plain_ops.clips(case.seq_len)], device=rows.device)
    clip = torch.searchsorted(ends, torch.arange(case.seq_len, device=rows.device), right=True)
    return clip[rows].unsqueeze(1) != clip.unsqueeze(0)


def _rows_of_attention(
    qkv: Sequence[Tensor], rows: Tensor, hidden: Tensor | None, douts: Sequence[Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """out, lse and dq of some rows, and dk and dv, when only those rows have incoming gradients."""
    q, k, v = (t.to(dtype).requires_grad_() for t in (qkv[0][:, rows], qkv[1], qkv[2]))
    outs = plain_ops.attention_with_lse(q, k, v, hidden)
    chosen = [dout.index_select(dim, rows).to(dtype) for dim, dout in zip((1, 2), douts, strict=False)]
    dq, dk, dv = torch.autograd.grad(outs[: len(chosen)], (q, k, v), chosen)
    return {"out": outs[0].detach(), "lse": outs[1].detach(), "dq": dq, "dk": dk, "dv": dv}


class _Sums:
    """Squared norms of the reference and of two differences from it, gathered block by block."""

    def __init__(self) -> None:
        self.reference = self.got = self.eager = 0.0

    def add(self, got: Tensor, eager: Tensor, exact: Tensor) -> None:
        exact = exact.double()
        self.reference += exact.square().sum().item()
        self.got += (got.double() - exact).square().sum().item()
        self.eager += (eager.double() - exact).square().sum().item()

    def error(self) -> float:
        return self._relative(self.got)

    def allowed(self, eps: float) -> float:
        return KERNEL_ERROR_FACTOR * self._relative(self.eager) + _FLOOR * eps

    def _relative(self, squared: float) -> float:
        if math.isnan(squared):
            return math.inf
        if self.reference == 0.0:
            return 0.0 if squared == 0.0 else math.inf
        return math.sqrt(squared / self.reference)


def _check_rows(
    case: OpCase,
    inputs: Mapping[str, Tensor],
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    douts: Sequence[Tensor],
    names: Sequence[str],
) -> Verdict:
    op = OPS[case.op]
    in_dims, out_dims = op.row_dims[: len(inputs)], op.row_dims[len(inputs) :]
    largest = max(t.numel() for t in (*inputs.values(), *outs))
    units = op.units(case)
    step = max(1, min(units, _BLOCK_ELEMENTS * units // largest))
    sums = {name: _Sums() for name in [*names, *(f"d{name}" for name in inputs if grads)]}
    # Gradients of shared inputs, exact and in the dtype, summed over blocks.
    totals: dict[str, tuple[Tensor, Tensor]] = {}
    plain = op.plain(case)
    for start in range(0, units, step):
        size = min(step, units - start)

        def block(tensor: Tensor, dim: int | None, start: int = start, size: int = size) -> Tensor:
            if dim is None:
                return tensor
            per = 1 if tensor.shape[dim] == units else op.unit
            return tensor.narrow(dim, per * start, min(per * size, tensor.shape[dim] - per * start))

        parts = [block(t.detach(), dim) for t, dim in zip(inputs.values(), in_dims, strict=True)]
        dparts = [block(d, dim) for d, dim in zip(douts, out_dims, strict=False)]
        exact, eager = (_evaluate(plain, parts, dparts, wide) for wide in (True, False))
        for i, (name, dim) in enumerate(zip(names, out_dims, strict=True)):
            sums[name].add(block(outs[i], dim), eager[0][i], exact[0][i])
        for i, (name, dim) in enumerate(zip(inputs, in_dims, strict=True) if grads else ()):
            if dim is not None:
                sums[f"d{name}"].add(block(grads[i], dim), eager[1][i], exact[1][i])
            else:
                more = exact[1][i].double(), eager[1][i].double()
                before = totals.get(name)
                totals[name] = more if before is None else (before[0] + more[0], before[1] + more[1])
    for i, (name, dim) in enumerate(zip(inputs, in_dims, strict=True) if grads else ()):
        if dim is None:
            exact_sum, eager_sum = totals[name]
            sums[f"d{name}"].add(grads[i], eager_sum, exact_sum)
    eps = torch.finfo(DTYPES[case.dtype]).eps
    return Verdict(
        error={name: found.error() for name, found in sums.items()},
        allowed={name: found.allowed(eps) for name, found in sums.items()},
    )


def _evaluate(
    plain: Callable[..., Outputs], parts: Sequence[Tensor], douts: Sequence[Tensor], wide: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Outputs and gradients of one block, in fp64 or as the tensors are."""
    leaves = [(t.double() if wide else t).requires_grad_(bool(douts)) for t in parts]
    if not douts:
        return plain(*leaves), ()
    outs = plain(*leaves)
    return [o.detach() for o in outs], torch.autograd.grad(
        outs, leaves, [d.to(o.dtype) for d, o in zip(douts, outs, strict=True)]
    )
