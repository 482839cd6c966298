"""Models, samples and steps whose gradients tests compare with one device."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longreel.kernels.numerics import gradient_errors, relative_error
from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.models.patches import grid_coords, patchify
from longreel.models.sequence import SequenceLengths
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import ParallelMesh, build_mesh
from longreel.parallel.offload import HostStore
from longreel.parallel.parallelize import Batch, PackedBatch, ParallelDiT
from longreel.parallel.strategies import Local

LATENT_SHAPE = (3, 6, 10, 4)
TEXT_TOKENS = 6

STRATEGIES = ["ulysses", "fastseq", "ring", "usp"]
CONDITIONINGS: dict[str, dict[str, Any]] = {
    "adaln": {"conditioning": "adaln"},
    "cross": {"conditioning": "cross"},
    "in_context": {"conditioning": "in_context"},
    "text_only": {"conditioning": "cross", "text_only": True},
    "published": {"conditioning": "cross", "text_only": True, "cross_layout": "published"},
    "cross_published": {"conditioning": "cross", "cross_layout": "published"},
}


def tiny_config(conditioning: str, **overrides: Any) -> DiTConfig:
    fields = {"depth": 2, "hidden_size": 64, "num_heads": 8, "mlp_ratio": 2.0, "text_dim": 16}
    return DiTConfig(**(fields | {"max_text_tokens": TEXT_TOKENS} | CONDITIONINGS[conditioning] | overrides))


def randomised_dit(config: DiTConfig, dtype: torch.dtype) -> DiT:
    """At initialisation the gates are zero and so is every gradient before the last layer: nothing would be tested."""
    torch.manual_seed(0)
    model = DiT(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def samples(count: int, dtype: torch.dtype, shape: tuple[int, ...] = LATENT_SHAPE) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "latents": torch.randn(count, *shape, dtype=dtype),
        "noise": torch.randn(count, *shape, dtype=dtype),
        "timestep": torch.rand(count, dtype=dtype),
        "text": torch.randn(count, TEXT_TOKENS, 16, dtype=dtype),
    }


def one_device(model: DiT, data: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient of the latents and of every parameter, written out without longreel.parallel's splitting."""
    model = copy.deepcopy(model)
    latents = data["latents"].clone().requires_grad_()
    t = data["timestep"].reshape(-1, 1, 1, 1, 1)
    noised = patchify((1 - t) * latents + t * data["noise"], model.config.patch_size)
    grid = model.config.grid(*latents.shape[1:4])
    num_tokens = noised.shape[1]
    in_sequence = TEXT_TOKENS if model.config.conditioning == "in_context" else 0
    whole = SequenceLengths(valid=num_tokens + in_sequence, padded=num_tokens + in_sequence)
    prediction = model(
        noised,
        grid_coords(grid, 0, num_tokens, dtype=noised.dtype),
        data["timestep"] * 1000,
        text=data["text"],
        sp=Local(provider="torch"),
        lengths=whole,
        text_lengths=SequenceLengths(valid=TEXT_TOKENS, padded=TEXT_TOKENS),
    )
    target = patchify(data["noise"] - latents, model.config.patch_size)
    loss = (prediction - target).square().mean()
    loss.backward()
    return loss.detach(), latents.grad, {name: p.grad for name, p in model.named_parameters()}


def parities(
    cases: list[tuple[DiTConfig, ParallelConfig, tuple[int, ...], tuple[int, ...] | None]],
) -> list[dict[str, float]]:
    """parity() in fp64 of many cases that spread a sequence alike, over one mesh: groups are dear to build."""
    mesh = build_mesh(sp_degree=cases[0][1].sp_degree, ulysses_degree=cases[0][1].ulysses_degree)
    errors = []
    for model, parallel, counts, shape in cases:
        try:
            errors.append(parity(model, parallel, counts, torch.float64, shape, mesh))
        except Exception as error:
            error.add_note(f"case {model}, {parallel}, {counts}, {shape}")
            raise
    return errors


# Clips of one packed sequence: of one token, of sizes that no degree divides, longer and shorter than a rank's part.
CLIP_SHAPES = ((3, 6, 10, 4), (1, 2, 2, 4), (2, 6, 4, 4), (5, 2, 6, 4), (1, 4, 2, 4))


@lru_cache(16)
def each_alone(
    config: DiTConfig, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Mean loss of clips of these shapes, each alone on one device, and its gradients by clip and by parameter."""
    model = randomised_dit(config, dtype)
    clips = draw_clips(shapes, dtype)
    results = [one_device(model, {name: values[i][None] for name, values in clips.items()}) for i in range(len(shapes))]
    loss = torch.stack([loss for loss, _, _ in results]).mean()
    dx = [dx[0] / len(shapes) for _, dx, _ in results]
    return loss, dx, {name: sum(grads[name] for _, _, grads in results) / len(shapes) for name in results[0][2]}


def draw_clips(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Latents, noise, timestep and text of every clip."""
    torch.manual_seed(1)
    return {
        "latents": [torch.randn(shape, dtype=dtype) for shape in shapes],
        "noise": [torch.randn(shape, dtype=dtype) for shape in shapes],
        "timestep": list(torch.rand(len(shapes), dtype=dtype)),
        "text": list(torch.randn(len(shapes), TEXT_TOKENS, 16, dtype=dtype)),
    }


def parity(
    config: DiTConfig,
    parallel: ParallelConfig,
    counts: tuple[int, ...],
    dtype: torch.dtype,
    shape: tuple[int, ...] | None = LATENT_SHAPE,
    mesh: ParallelMesh | None = None,
) -> dict[str, float]:
    """Largest errors of one step against one device; dp rank d trains counts[d] samples of a shape, or packed clips."""
    mesh = mesh or build_mesh(sp_degree=parallel.sp_degree, ulysses_degree=parallel.ulysses_degree)
    shapes = CLIP_SHAPES[: sum(counts)] if shape is None else (shape,) * sum(counts)
    loss0, dx0, grads0 = each_alone(config, shapes, dtype)

    first = sum(counts[: mesh.dp_rank])
    own = range(first, first + counts[mesh.dp_rank])
    clips = {name: [values[i] for i in own] for name, values in draw_clips(shapes, dtype).items()}
    leaves = [clip.requires_grad_() for clip in clips["latents"]]
    fields = {"timestep": torch.stack(clips["timestep"]), "text": torch.stack(clips["text"])}
    batch: Batch | PackedBatch
    if shape is None:
        batch = PackedBatch(latents=tuple(leaves), noise=tuple(clips["noise"]), global_samples=len(shapes), **fields)
    else:
        stacked = torch.stack(leaves), torch.stack(clips["noise"])
        batch = Batch(latents=stacked[0], noise=stacked[1], global_samples=len(shapes), **fields)
    if parallel.engine == "colossalai":
        import cpu_accelerator

        cpu_accelerator.use()
    # Tiny activations leave the device too.
    spread = ParallelDiT(randomised_dit(config, dtype), mesh, parallel, store=HostStore(min_bytes=1))
    if parallel.engine == "colossalai":
        # Its gradients are in the optimizer.
        spread.engine.attach(torch.optim.AdamW(spread.parameters()))
    loss = spread.loss(batch)
    spread.engine.backward(loss)

    world = dist.get_world_size()
    total = loss.detach() / world
    dist.all_reduce(total)
    dx_errors = []
    for i, expected in enumerate(dx0):
        grad = leaves[i - first].grad if i in own else None
        dx = torch.zeros_like(expected) if grad is None else grad / world
        dist.all_reduce(dx)
        dx_errors.append(relative_error(dx, expected))
    errors = gradient_errors(spread.engine.full_gradients(), grads0)
    return {"loss": relative_error(total, loss0), "dx": max(dx_errors), "dw": max(errors.values())}


def fp64(
    strategy: str, degree: int, engine: str = "fsdp2-zero2", policy: str = "none", *, num_heads: int = 8
) -> ParallelConfig:
    """A configuration by strategy, or one of its forms: `fastseq-attention`, `ulysses-chunks` (a head at a time) ..."""
    name, _, form = strategy.partition("-")
    ulysses_degree = max(degree // 2, 1) if name == "usp" else None
    return ParallelConfig(
        strategy=name,
        sp_degree=degree,
        ulysses_degree=ulysses_degree,
        head_chunks=num_heads // degree if form == "chunks" else None,
        fastseq_overlap=form if name == "fastseq" and form else "auto",
        engine=engine,
        policy=policy,
        precision="fp64",
        attention_provider="torch",
    )
