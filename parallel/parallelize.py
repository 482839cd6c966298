"""How a DiT is split over ranks: the one place that says where tokens, positions, text and targets are cut.

Every rank of an SP group is handed the same samples. It computes its own rows of the sequence and a loss weighted so
that gradients, averaged over all dp x sp ranks, are those of one device on the whole global step: a token of a
sample weighs dp P / (n_valid(sample) * samples in the global step).
Shapes: latents [B, T, H, W, C_in]; N video tokens, L text tokens, S tokens of the sequence, s rows of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.models.flow import TIMESTEP_SCALE, interpolate, velocity_target
from longreel.models.patches import grid_coords, patchify, unpatchify
from longreel.models.sequence import SequenceLengths, SequenceParallel
from longreel.parallel.config import ParallelConfig, check_heads
from longreel.parallel.engine import Engine, apply_policy, build_engine
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.offload import HostStore
from longreel.parallel.strategies import build_strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The samples of one SP group in one micro-batch, the same on each of its ranks.

    Args:
        latents, noise: [B, T, H, W, C_in]. B may differ between dp ranks.
        timestep: [B] in [0, 1], fp32: 0 is data, 1 is noise.
        text: [B, L, text_dim] features, or None for a model without text.
        labels: [B] class labels, or None.
        global_samples: samples of the whole step, over dp ranks and micro-batches.
    """

    latents: Tensor
    noise: Tensor
    timestep: Tensor
    text: Tensor | None = None
    labels: Tensor | None = None
    global_samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of the sequence [text | video | padding] that one rank holds.

    Args:
        lengths: of the whole sequence.
        text: (start, stop) among the text tokens of the sequence (empty unless conditioning is in-context).
        video: (start, stop) among the video tokens; padding counts on beyond their number.
        num_video: video tokens among them that exist.
    """

    lengths: SequenceLengths
    text: tuple[int, int]
    video: tuple[int, int]
    num_video: int


def split_rows(*, num_text: int, num_video: int, degree: int, rank: int) -> Rows:
    """Which rows of a sequence of num_text + num_video tokens rank holds, out of `degree` equal parts."""
    valid = num_text + num_video
    size = -(-valid // degree)
    start, stop = rank * size, (rank + 1) * size
    text = min(start, num_text), min(stop, num_text)
    video = max(start - num_text, 0), max(stop - num_text, 0)
    existing = max(min(video[1], num_video) - min(video[0], num_video), 0)
    return Rows(lengths=SequenceLengths(valid=valid, padded=size * degree), text=text, video=video, num_video=existing)


def take_rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Rows start to stop of x [B, N, ...]; rows beyond N are zeros."""
    taken = x[:, min(start, x.shape[1]) : min(stop, x.shape[1])]
    return F.pad(taken, (0, 0) * (x.dim() - 2) + (0, stop - start - taken.shape[1]))


class ParallelDiT:
    """A DiT spread over the ranks of a mesh.

    Args:
        model: the whole model, the same parameters on every rank.
        mesh: dp x sp ranks.
        config: strategy, engine, policy, precision.
        store: host memory of policy `offload`; one within config's budget if not given.

    Raises:
        ValueError: the mesh does not fit the configuration, or the ranks do not divide the heads.
    """

    def __init__(
        self, model: DiT, mesh: ParallelMesh, config: ParallelConfig, *, store: HostStore | None = None
    ) -> None:
        if mesh.sp_degree != config.sp_degree:
            raise ValueError(f"the mesh has sp_degree {mesh.sp_degree}, the configuration {config.sp_degree}")
        check_heads(model.config.num_heads, config.heads_degree)
        self.model_config: DiTConfig = model.config
        self.config = config
        self.mesh = mesh
        self.strategy: SequenceParallel = build_strategy(config, mesh)
        if config.precision == "fp64":
            model = model.double()
        gib = config.host_memory_gib
        self.store = store or HostStore(budget_bytes=None if gib is None else int(gib * (1 << 30)))
        apply_policy(model, config.policy, config.mlp_tile, self.store)
        self.engine: Engine = build_engine(model, mesh, config)
        self.module: nn.Module = self.engine.module

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the wrapped module (shards, under FSDP2)."""
        return self.module.parameters()

    @property
    def loss_dtype(self) -> torch.dtype:
        """Dtype of targets and loss: fp32, or fp64 in an fp64 run."""
        return torch.float64 if self.config.precision == "fp64" else torch.float32

    def loss(self, batch: Batch) -> Tensor:
        """This rank's share of the rectified-flow loss; give it to engine.backward().

        Returns:
            A scalar. Its mean over all ranks is the mean over samples and tokens of one device, and so are the
            gradients that the engine averages.
        """
        config = self.model_config
        grid = config.grid(*batch.latents.shape[1:4])
        num_video = grid[0] * grid[1] * grid[2]
        rows = self._rows(batch.text, num_video)
        x0, noise = (
            take_rows(patchify(x.to(self.loss_dtype), config.patch_size), *rows.video)
            for x in (batch.latents, batch.noise)
        )
        t = batch.timestep.to(self.loss_dtype)
        prediction = self._forward(interpolate(x0, noise, t), rows, grid, batch.timestep, batch.text, batch.labels)
        error = self._data_channels(prediction) - velocity_target(x0, noise)
        weight = self.mesh.dp_degree * self.mesh.sp_degree / (num_video * batch.global_samples)
        # An empty slice still ties the loss to the graph: this rank's collectives in backward must run.
        return error[:, : rows.num_video].square().mean(-1).sum() * weight if rows.num_video else prediction.sum() * 0

    @torch.no_grad()
    def velocity(
        self, latents: Tensor, timestep: Tensor, text: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Predicted velocity of noised latents, whole, on every rank of the SP group.

        Args:
            latents: [B, T, H, W, C_in], the same on each rank. timestep: [B] in [0, 1].
            text: [B, L, text_dim]. labels: [B].

        Returns:
            [B, T, H, W, C_in], fp32 (fp64 in an fp64 run).
        """
        config = self.model_config
        grid = config.grid(*latents.shape[1:4])
        num_video = grid[0] * grid[1] * grid[2]
        rows = self._rows(text, num_video)
        x = take_rows(patchify(latents.to(self.loss_dtype), config.patch_size), *rows.video)
        prediction = self._data_channels(self._forward(x, rows, grid, timestep, text, labels))
        # Ranks hold different numbers of video rows: whole rows of the sequence are gathered, text rows as zeros.
        num_text = rows.lengths.valid - num_video
        local = F.pad(prediction, (0, 0, rows.text[1] - rows.text[0], 0))
        whole = self.strategy.unshard(local, 1)[:, num_text : num_text + num_video]
        return unpatchify(whole, grid, config.patch_size, config.in_channels)

    def _rows(self, text: Tensor | None, num_video: int) -> Rows:
        in_sequence = text is not None and self.model_config.conditioning == "in_context"
        return split_rows(
            num_text=text.shape[1] if in_sequence and text is not None else 0,
            num_video=num_video,
            degree=self.mesh.sp_degree,
            rank=self.mesh.sp_rank,
        )

    def _forward(
        self,
        tokens: Tensor,
        rows: Rows,
        grid: tuple[int, int, int],
        timestep: Tensor,
        text: Tensor | None,
        labels: Tensor | None,
    ) -> Tensor:
        config = self.model_config
        text_lengths = None
        if text is not None and config.conditioning == "in_context":
            text = take_rows(text, *rows.text)
        elif text is not None and config.cross_layout == "published":
            text_rows = split_rows(
                num_text=0, num_video=text.shape[1], degree=self.mesh.sp_degree, rank=self.mesh.sp_rank
            )
            text_lengths = text_rows.lengths
            text = take_rows(text, *text_rows.video)
        coords = grid_coords(grid, *rows.video, device=tokens.device, dtype=self.loss_dtype)
        return self.module(
            tokens,
            coords,
            timestep.to(self.loss_dtype) * TIMESTEP_SCALE,
            text=text,
            labels=labels,
            sp=self.strategy,
            lengths=rows.lengths,
            text_lengths=text_lengths,
        )

    def _data_channels(self, prediction: Tensor) -> Tensor:
        """The velocity of the prediction [B, s, volume * C_out], in loss_dtype: a learned sigma is left out."""
        config = self.model_config
        prediction = prediction.to(self.loss_dtype)
        if config.learn_sigma:
            prediction = prediction.unflatten(-1, (-1, config.out_channels))[..., : config.in_channels].flatten(-2)
        return prediction
