"""The correctness gate: loss and gradients of one step against one device, fp32, eager attention.

In half precision a step may be off by twice what one device that computes in it is off by.
The step holds a sample of the point's length in the first data-parallel group and short samples, all different, in the
others: an error of one length or of the sum over groups shows, and the oracle costs one long sample.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from longreel.bench.cases import FRAME_SIDE
from longreel.kernels import attention
from longreel.kernels.numerics import KERNEL_ERROR_FACTOR, PARALLEL_TOLERANCE, gradient_errors
from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.models.flow import TIMESTEP_SCALE, interpolate, velocity_target
from longreel.models.patches import grid_coords, patchify
from longreel.models.sequence import SequenceLengths
from longreel.parallel.config import DTYPES, HALF_PRECISIONS, ParallelConfig, Precision
from longreel.parallel.mesh import build_mesh
from longreel.parallel.parallelize import Batch, ParallelDiT
from longreel.parallel.strategies import Local

TOLERANCE = PARALLEL_TOLERANCE[torch.float32]
SHORT_LEN = 256
# Queries at a time in the oracle: scores of a block stay in cache-sized buffers that malloc reuses.
_QUERY_BLOCK = 128
_GATE_STD = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sample: latents and noise [1, T, H, W, C_in], timestep [1] in [0, 1], text [1, L, text_dim]."""

    latents: Tensor
    noise: Tensor
    timestep: Tensor
    text: Tensor

    def to(self, device: torch.device | str) -> Sample:
        """The same on a device."""
        return Sample(
            latents=self.latents.to(device),
            noise=self.noise.to(device),
            timestep=self.timestep.to(device),
            text=self.text.to(device),
        )


def token_grid(seq_len: int) -> tuple[int, int, int]:
    """Patches (t, h, w) of seq_len tokens: frames of 16 x 16 where that divides, else one row."""
    frame = FRAME_SIDE**2
    return (seq_len // frame, FRAME_SIDE, FRAME_SIDE) if seq_len % frame == 0 else (1, 1, seq_len)


def make_sample(config: DiTConfig, seq_len: int, *, index: int, seed: int) -> Sample:
    """Sample `index` of the sweep's random data, the same in every process."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + index)
    shape = (1, *(n * p for n, p in zip(token_grid(seq_len), config.patch_size, strict=True)), config.in_channels)
    return Sample(
        latents=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        timestep=torch.rand(1, generator=generator),
        text=torch.randn(1, config.max_text_tokens, config.text_dim, generator=generator),
    )


def build_model(config: DiTConfig, seed: int) -> DiT:
    """The model with weights by seed. Nothing is zero: at zero gates most gradients would be, and prove nothing."""
    torch.manual_seed(seed)
    model = DiT(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=_GATE_STD)
    return model


@dataclass(frozen=True, kw_only=True, slots=True)
class EagerLocal(Local):
    """One device, the eager specification of attention over blocks of queries."""

    provider: str = "torch"

    def self_attention(self, x: Tensor, qkv: nn.Linear, *, num_heads: int, lengths: SequenceLengths) -> Tensor:
        """See longreel.models.sequence.SequenceParallel."""
        q, k, v = qkv(x).unflatten(-1, (3, num_heads, -1)).unbind(2)
        blocks = [attention(block, k, v, provider=self.provider)[0] for block in q.split(_QUERY_BLOCK, dim=1)]
        return torch.cat(blocks, dim=1).flatten(2)


def oracle(
    config: DiTConfig, seq_len: int, *, index: int, seed: int, device: torch.device | str = "cpu"
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one sample on one device, written without longreel.parallel.parallelize.

    How ranks lay out the text makes no difference on one device: there is nothing to shard.
    """
    model = build_model(replace(config, cross_layout="replicated"), seed).to(device)
    sample = make_sample(config, seq_len, index=index, seed=seed).to(device)
    x0, noise = (patchify(x, config.patch_size) for x in (sample.latents, sample.noise))
    prediction = model(
        interpolate(x0, noise, sample.timestep),
        grid_coords(token_grid(seq_len), 0, seq_len, device=x0.device),
        sample.timestep * TIMESTEP_SCALE,
        text=sample.text,
        sp=EagerLocal(),
        lengths=SequenceLengths(valid=seq_len, padded=seq_len),
    )
    loss = (prediction - velocity_target(x0, noise)).square().mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gate_length(seq_len: int, dp_rank: int) -> int:
    """Tokens of the gate's sample in data-parallel group dp_rank."""
    return seq_len if dp_rank == 0 else min(SHORT_LEN, seq_len)


def write_oracle(
    config: DiTConfig,
    seq_len: int,
    max_dp: int,
    seed: int,
    path: str,
    precision: Precision = "fp32",
    device: str = "cpu",
) -> None:
    """Compute the oracle of one length for up to max_dp groups and write it to a file (in a worker of its own).

    The file holds `losses` and `grads` with one entry per group, and `tolerance`: of loss and gradients.

    Args:
        config: the DiT. seq_len: tokens of the first group's sample. seed: of weights and data.
        path: the file. precision: of the runs that are compared with it; half precision wants a process group of one.
        device: where it is computed.
    """
    found = [oracle(config, gate_length(seq_len, i), index=i, seed=seed, device=device) for i in range(max_dp)]
    losses = [loss for loss, _ in found]
    grads = [{name: grad.cpu() for name, grad in group.items()} for _, group in found]
    tolerance = TOLERANCE
    if precision in HALF_PRECISIONS:
        tolerance = _half_precision_tolerance(
            config, seq_len, seed, precision, torch.device(device), losses[0], grads[0]
        )
    # Whole or not there: a worker may be lost while it writes.
    torch.save({"losses": losses, "grads": grads, "tolerance": tolerance}, f"{path}.part")
    os.replace(f"{path}.part", path)


def _half_precision_tolerance(
    config: DiTConfig,
    seq_len: int,
    seed: int,
    precision: Precision,
    device: torch.device,
    loss: float,
    grads: dict[str, Tensor],
) -> float:
    """Twice the error of one device that computes in this precision, plus one unit of rounding."""
    parallel = ParallelConfig(precision=precision, attention_provider="sdpa-flash")
    mesh = build_mesh(sp_degree=1, device_type=device.type)
    model = ParallelDiT(build_model(config, seed).to(device), mesh, parallel)
    sample = make_sample(config, seq_len, index=0, seed=seed).to(device)
    found = model.loss(
        Batch(
            latents=sample.latents,
            noise=sample.noise,
            timestep=sample.timestep,
            text=sample.text,
            global_samples=1,
        )
    )
    model.engine.backward(found)
    errors = gradient_errors({name: g.cpu() for name, g in model.engine.full_gradients().items()}, grads)
    worst = max(*errors.values(), abs(found.item() - loss) / abs(loss))
    return KERNEL_ERROR_FACTOR * worst + torch.finfo(DTYPES[precision]).eps


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Relative errors of loss and of the worst gradient, whose parameter is named."""

    loss: float
    grad: float
    parameter: str
    tolerance: float = TOLERANCE

    @property
    def reason(self) -> str | None:
        """Why the gate is closed, None when it is open."""
        if not self.loss <= self.tolerance:
            return f"loss differs from one device by {self.loss:.1e}, tolerance {self.tolerance:.0e}"
        if not self.grad <= self.tolerance:
            worst = f"gradient of {self.parameter} differs from one device by {self.grad:.1e}"
            return f"{worst}, tolerance {self.tolerance:.0e}"
        return None


def compare(loss: float, grads: dict[str, Tensor], path: str | Path, *, dp_degree: int) -> Verdict:
    """Loss and whole gradients of a distributed step against the oracle in a file.

    Args:
        loss: mean over ranks of their losses. grads: by parameter name.
        path: written by write_oracle for at least dp_degree groups.
    """
    stored = torch.load(path, weights_only=True)
    losses, per_group = stored["losses"], stored["grads"]
    expected = sum(losses[:dp_degree]) / dp_degree
    reference = {name: sum(g[name] for g in per_group[:dp_degree]) / dp_degree for name in per_group[0]}
    errors = gradient_errors({name: grad.cpu() for name, grad in grads.items()}, reference)
    worst = max(errors, key=errors.__getitem__)
    loss_error = abs(loss - expected) / abs(expected)
    return Verdict(
        loss=loss_error if loss_error == loss_error else float("inf"),
        grad=errors[worst],
        parameter=worst,
        tolerance=stored["tolerance"],
    )
