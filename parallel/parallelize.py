"""How a DiT is split over ranks: the one place that says where tokens, positions, text and targets are cut.

Every rank of an SP group is handed the same samples. It computes its own rows of the sequence and a loss weighted so
that gradients, averaged over all dp x sp ranks, are those of one device on the whole global step: a token of a
sample weighs dp P / (n_valid(sample) * samples in the global step).
Shapes: latents [B, T, H, W, C_in]; N clips of a packed batch, L text tokens, s rows of this rank, v of them video.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.models.flow import RectifiedFlow
from longreel.models.objective import Objective
from longreel.models.patches import grid_coords, patchify, unpatchify
from longreel.models.sequence import SequenceParallel
from longreel.parallel.agreement import check_agreement
from longreel.parallel.config import ParallelConfig, check_head_chunks, check_ranks
from longreel.parallel.engine import Engine, apply_policy, build_engine
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.offload import HostStore
from longreel.parallel.rows import ClipRows, Rows, packing_of, split_rows, take_rows
from longreel.parallel.strategies import build_strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The samples of one SP group in one micro-batch, the same on each of its ranks.

    Args:
        latents, noise: [B, T, H, W, C_in]. B may differ between dp ranks.
        timestep: [B], fp32, in the objective's units: for a flow in [0, 1], 0 being data, 1 noise.
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
class PackedBatch:
    """Clips of any lengths and sizes that one SP group trains as one sequence, the same on each of its ranks.

    Args:
        latents, noise: of N clips, each [T, H, W, C_in]. N may differ between dp ranks.
        timestep: [N], fp32, as in Batch. text: [N, L, text_dim] or None. labels: [N] or None.
        global_samples: clips of the whole step, over dp ranks and micro-batches.
    """

    latents: tuple[Tensor, ...]
    noise: tuple[Tensor, ...]
    timestep: Tensor
    text: Tensor | None = None
    labels: Tensor | None = None
    global_samples: int

    def __post_init__(self) -> None:
        sizes = [list(clip.shape) for clip in self.latents]
        if not sizes or sizes != [list(clip.shape) for clip in self.noise] or any(len(size) != 4 for size in sizes):
            raise ValueError(
                f"latents and noise must be N >= 1 clips [T, H, W, C_in] of the same sizes, got latents {sizes} and "
                f"noise {[list(clip.shape) for clip in self.noise]}"
            )
        for name, value in (("timestep", self.timestep), ("text", self.text), ("labels", self.labels)):
            if value is not None and value.shape[:1] != (len(sizes),):
                raise ValueError(f"{name} must have one row for each of {len(sizes)} clips, got {list(value.shape)}")


class ParallelDiT:
    """A DiT spread over the ranks of a mesh.

    Args:
        model: the whole model, the same parameters on every rank.
        mesh: dp x sp ranks.
        config: strategy, engine, policy, precision.
        objective: what it learns; rectified flow if not given.
        store: host memory of policy `offload`; one within config's budget if not given.

    Raises:
        ValueError: the mesh does not fit the configuration, the ranks do not divide the heads, or the objective needs a
            model with learn_sigma.
    """

    def __init__(
        self,
        model: DiT,
        mesh: ParallelMesh,
        config: ParallelConfig,
        *,
        objective: Objective | None = None,
        store: HostStore | None = None,
    ) -> None:
        if mesh.sp_degree != config.sp_degree:
            raise ValueError(f"the mesh has sp_degree {mesh.sp_degree}, the configuration {config.sp_degree}")
        config.check_heads(model.config.num_heads)
        if config.head_chunks is not None:
            check_head_chunks(config.head_chunks, model.config.num_heads // config.heads_degree)
        self.objective: Objective = objective or RectifiedFlow()
        if self.objective.learn_sigma and not model.config.learn_sigma:
            raise ValueError("this objective learns a variance; build the model with learn_sigma=True")
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

    def loss(self, batch: Batch | PackedBatch) -> Tensor:
        """This rank's share of the objective's loss; give it to engine.backward().

        Returns:
            A scalar. Its mean over all ranks is the mean over samples and tokens of one device, and so are the
            gradients that the engine averages.

        Raises:
            ValueError: the configuration does not take this batch, the sequence has fewer tokens than ranks, or (on
                every rank of the SP group) its ranks hold batches of different sizes.
        """
        self._check_batch(batch)
        grids = [self.model_config.grid(*size) for size in _sizes(batch)]
        rows = self._rows(batch.text, [math.prod(grid) for grid in grids])
        # One sample of a packed batch after the other, or all samples of the other kind at once.
        prepared, times = [], []
        for clip, (latents, noise, timestep) in zip(rows.clips, _parts(batch), strict=True):
            times.append(timestep.to(self.loss_dtype))
            x0, noise = (self._patches(x, clip) for x in (latents, noise))
            prepared.append(self.objective.prepare(x0, noise, times[-1]))
        prediction = self._forward(torch.cat([noised for noised, _ in prepared], dim=1), rows, grids, batch)
        predictions = prediction.split([noised.shape[1] for noised, _ in prepared], dim=1)
        errors = [
            self._loss_sum(*(x[:, : clip.num_video] for x in (predicted, *targets)), t=t)
            / (math.prod(grid) * batch.global_samples)
            for clip, grid, predicted, (_, targets), t in zip(
                rows.clips, grids, predictions, prepared, times, strict=True
            )
            if clip.num_video
        ]
        # Without video rows the loss is still tied to the graph: this rank's collectives in backward must run.
        loss = torch.stack(errors).sum() if errors else prediction.sum() * 0
        return loss * (self.mesh.dp_degree * self.mesh.sp_degree)

    @torch.no_grad()
    def output(
        self, latents: Tensor, timestep: Tensor, text: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """What the model says of noised latents, whole, on every rank of the SP group.

        Args:
            latents: [B, T, H, W, C_in], the same on each rank. timestep: [B] in the objective's units.
            text: [B, L, text_dim]. labels: [B].

        Returns:
            [B, T, H, W, C_out], fp32 (fp64 in an fp64 run).

        Raises:
            ValueError: as of loss().
        """
        config = self.model_config
        batch = Batch(
            latents=latents, noise=latents, timestep=timestep, text=text, labels=labels, global_samples=len(latents)
        )
        self._check_batch(batch)
        grid = config.grid(*latents.shape[1:4])
        num_video = math.prod(grid)
        rows = self._rows(text, [num_video])
        (clip,) = rows.clips
        prediction = self._forward(self._patches(latents, clip), rows, [grid], batch).to(self.loss_dtype)
        # Ranks hold different numbers of video rows: whole rows of the sequence are gathered, text rows as zeros.
        num_text = rows.lengths.valid - num_video
        local = F.pad(prediction, (0, 0, clip.text[1] - clip.text[0], 0))
        whole = self.strategy.unshard(local, 1)[:, num_text : num_text + num_video]
        return unpatchify(whole, grid, config.patch_size, config.out_channels)

    def _patches(self, latents: Tensor, clip: ClipRows) -> Tensor:
        """This rank's rows of latents [B, T, H, W, C_in]: [B, v, patch_dim], zeros for padding."""
        return take_rows(patchify(latents.to(self.loss_dtype), self.model_config.patch_size), *clip.video)

    def _rows(self, text: Tensor | None, num_video: list[int]) -> Rows:
        in_sequence = text is not None and self.model_config.conditioning == "in_context"
        rows = split_rows(
            num_text=text.shape[1] if in_sequence and text is not None else 0,
            num_video=num_video,
            degree=self.mesh.sp_degree,
            rank=self.mesh.sp_rank,
        )
        check_ranks(rows.lengths.valid, self.mesh.sp_degree)
        return rows

    def _check_batch(self, batch: Batch | PackedBatch) -> None:
        """ValueError on every rank of the SP group if its ranks hold batches of different sizes.

        What is compared is the batch as it came: a rank that looked at its own sizes first would raise alone, and leave
        the others waiting.
        """
        packed = isinstance(batch, PackedBatch)
        beside = [size for value in (batch.text, batch.labels) for size in ((-1,) if value is None else value.shape)]
        if isinstance(batch, PackedBatch):
            name = "cu_seqlens of the packed clips (their number, [T, H, W, C_in] of each"
            sizes = [len(batch.latents), *(size for clip in batch.latents for size in clip.shape)]
        else:
            name = "sizes of the batch (latents and noise [B, T, H, W, C_in]"
            sizes = [*batch.latents.shape, *batch.noise.shape]
        name += ", text [N, L, text_dim], labels [N], -1 for none, samples of the step, 1 if packed, timestep [N])"
        values = [*sizes, *beside, batch.global_samples, int(packed), *batch.timestep.shape]
        check_agreement(name, values, self.mesh.sp_group, batch.timestep.device)
        if packed and self.model_config.cross_layout == "published":
            raise ValueError("cross_layout 'published' takes no packed batch; use cross_layout 'replicated'")
        if batch.timestep.shape != (len(batch.latents),):
            raise ValueError(
                f"timestep must have one row for each of {len(batch.latents)} samples, got {list(batch.timestep.shape)}"
            )

    def _forward(
        self, tokens: Tensor, rows: Rows, grids: list[tuple[int, int, int]], batch: Batch | PackedBatch
    ) -> Tensor:
        config, text = self.model_config, batch.text
        text_lengths = packing = None
        if isinstance(batch, PackedBatch):
            in_context, num_text = config.conditioning == "in_context", 0 if text is None else text.shape[1]
            packing = packing_of(rows, num_text=num_text, in_context=in_context, device=tokens.device)
        if text is not None and config.conditioning == "in_context":
            texts = text.unsqueeze(1) if isinstance(batch, PackedBatch) else [text]
            text = torch.cat([take_rows(one, *clip.text) for one, clip in zip(texts, rows.clips, strict=True)], dim=1)
        elif text is not None and config.cross_layout == "published":
            text_rows = split_rows(
                num_text=0, num_video=[text.shape[1]], degree=self.mesh.sp_degree, rank=self.mesh.sp_rank
            )
            text_lengths = text_rows.lengths
            text = take_rows(text, *text_rows.clips[0].video)
        coords = [
            grid_coords(grid, *clip.video, device=tokens.device, dtype=self.loss_dtype)
            for grid, clip in zip(grids, rows.clips, strict=True)
        ]
        return self.module(
            tokens,
            torch.cat(coords),
            self.objective.model_timestep(batch.timestep.to(self.loss_dtype)),
            text=text,
            labels=batch.labels,
            sp=self.strategy,
            lengths=rows.lengths,
            text_lengths=text_lengths,
            packing=packing,
        )

    def _loss_sum(self, predicted: Tensor, *targets: Tensor, t: Tensor) -> Tensor:
        """Sum of the objective's loss over tokens of [B, v, ...]; by tiles, if there are, whose fp32 terms do not stay.

        Gradients of the loss go through the output alone: targets are data.
        """
        config = self.model_config

        def of(part: Tensor, *wanted: Tensor) -> Tensor:
            output = part.to(self.loss_dtype).unflatten(-1, (-1, config.out_channels))
            wanted = tuple(x.unflatten(-1, (-1, config.in_channels)) for x in wanted)
            return self.objective.token_loss(output, wanted, t).sum()

        tile = self.config.mlp_tile
        if tile is None:
            return of(predicted, *targets)
        tiles = zip(*(x.split(tile, dim=1) for x in (predicted, *targets)), strict=True)
        sums = [checkpoint(of, *parts, use_reentrant=False, preserve_rng_state=False) for parts in tiles]
        return torch.stack(sums).sum()


def _parts(batch: Batch | PackedBatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(latents, noise, timestep) with a batch dim, of each clip of a packed batch or of all samples at once."""
    if isinstance(batch, PackedBatch):
        parts = zip(batch.latents, batch.noise, batch.timestep.split(1), strict=True)
        return [(latents[None], noise[None], timestep) for latents, noise, timestep in parts]
    return [(batch.latents, batch.noise, batch.timestep)]


def _sizes(batch: Batch | PackedBatch) -> list[tuple[int, ...]]:
    """(T, H, W) of every clip of a packed batch, or the one of all samples."""
    if isinstance(batch, PackedBatch):
        return [tuple(clip.shape[:3]) for clip in batch.latents]
    return [tuple(batch.latents.shape[1:4])]
