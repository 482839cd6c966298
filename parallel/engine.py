"""Sharding engines and activation policies: what wraps the model before it trains.

Every engine averages gradients over all dp x sp ranks; longreel.parallel.parallelize weighs the loss to match.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from longreel.models.block import DiTBlock
from longreel.models.dit import DiT
from longreel.parallel.comm import all_reduce_sum, world
from longreel.parallel.config import DTYPES, HALF_PRECISIONS, POLICIES, ParallelConfig
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.offload import HostStore, OffloadedBlock
from longreel.parallel.strategies import SELF_ATTENTION_OPS


def apply_policy(model: DiT, policy: str, mlp_tile: int | None, store: HostStore) -> None:
    """Set each block up as the activation policy and the MLP's tile say, which is the final layer's too.

    Args:
        policy: `none` leaves blocks alone, `full` recomputes them in backward, `keep_attention` recomputes all but
            self-attention, whose op's outputs are kept (strategies save little else then: their `lean`), `offload`
            keeps those and the blocks' inputs in the store.

    Raises:
        ValueError: the policy is `auto`, which is chosen before a model is built.
    """
    if policy == "auto":
        raise ValueError(
            f"policy 'auto' is chosen before a training run builds its model; name one here: {', '.join(POLICIES)}"
        )
    for block in model.blocks:
        assert isinstance(block, DiTBlock)
        block.mlp_tile = mlp_tile
    model.final.tile = mlp_tile
    if policy == "none":
        return
    if policy == "offload":
        for i, block in enumerate(model.blocks):
            model.blocks[i] = OffloadedBlock(block, store)
        return
    context = {"context_fn": _keep_attention} if policy == "keep_attention" else {}
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(
            block, checkpoint_impl=CheckpointImpl.NO_REENTRANT, preserve_rng_state=False, **context
        )


def _keep_attention() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(list(SELF_ATTENTION_OPS))


class Engine:
    """A wrapped model and, once attached, its optimizer: what a training step and a checkpoint need of an engine.

    `fsdp2` and `ddp` are all in the wrapped module, and loss.backward() and optimizer.step() would do as well;
    longreel.parallel.colossalai_engine is in the optimizer too and overrides what follows.

    Args:
        module: the wrapped model, to be called for the forward pass.
        scaler: of an fp16 run: scales the loss, so that small gradients do not vanish, and leaves out steps whose
            gradients overflowed on any rank, halving the scale.
    """

    def __init__(self, module: nn.Module, scaler: torch.amp.GradScaler | None = None) -> None:
        self.module = module
        self.scaler = scaler
        self.optimizer: torch.optim.Optimizer | None = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Take an optimizer over all parameters of `module`; its param_groups stay the place for learning rates."""
        self.optimizer = optimizer

    def backward(self, loss: Tensor) -> None:
        """Backward, and the average of gradients over all ranks."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def accumulating(self) -> AbstractContextManager[Any]:
        """Around forward and backward of every micro-batch of a step but the last.

        fsdp2 and colossalai reduce gradients in each all the same: to hold them whole until the last would cost what
        their sharding saves.
        """
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else nullcontext()

    def clip(self, max_norm: float | None) -> Tensor:
        """Norm of all gradients together, whole and not scaled, before step(); all ranks call it, none waits for it.

        Args:
            max_norm: gradients are scaled down to it if their norm is above; None: they stay as they are.

        Returns:
            A scalar; not finite where the gradients are not.
        """
        if self.scaler is not None:
            assert self.optimizer is not None
            self.scaler.unscale_(self.optimizer)
        grads = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return clip_parts(
            [local_part(grad) for grad in grads], max_norm, sharded=any(isinstance(grad, DTensor) for grad in grads)
        )

    def masters(self) -> dict[str, Tensor]:
        """What the optimizer updates, by the plain model's names: this rank's part, or whole where not sharded."""
        return {plain_name(name): parameter for name, parameter in self.module.named_parameters()}

    def whole_masters(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors like masters() as a checkpoint takes them; all ranks call it."""
        return parts

    def parts_of_masters(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of whole_masters."""
        return whole

    def step(self) -> None:
        """One optimizer step; gradients are gone after it."""
        assert self.optimizer is not None
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    @property
    def loss_scale(self) -> float | None:
        """What an fp16 run scales the loss by; None in any other."""
        return None if self.scaler is None else float(self.scaler.get_scale())

    def scaled(self, x: Tensor) -> Tensor | None:
        """x times loss_scale, for which nothing waits; None where that is."""
        return None if self.scaler is None else self.scaler.scale(x)

    def full_gradients(self) -> dict[str, Tensor]:
        """Whole gradients on every rank, not scaled, by the model's own parameter names.

        Raises:
            ValueError: a parameter has no gradient.
        """
        grads = full_gradients(self.module)
        return grads if self.loss_scale is None else {name: grad / self.loss_scale for name, grad in grads.items()}

    def state(self) -> dict[str, Any]:
        """`model` and, with an optimizer attached, `optimizer` (and `scaler`), for torch.distributed.checkpoint.

        Names and shapes are those of the plain model, whatever the engine; all ranks call it.
        """
        if self.optimizer is None:
            return {"model": get_model_state_dict(self.module)}
        model, optimizer = get_state_dict(self.module, self.optimizer)
        scaler = {} if self.scaler is None else {"scaler": self.scaler.state_dict()}
        return {"model": model, "optimizer": optimizer} | scaler

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what state() gave, after a checkpoint was read into it."""
        if self.optimizer is None:
            set_model_state_dict(self.module, state["model"])
            return
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


def build_engine(model: DiT, mesh: ParallelMesh, config: ParallelConfig) -> Engine:
    """The model under the engine that config names.

    Raises:
        ValueError: `colossalai` is not installed, or not for this device.
    """
    if config.engine == "colossalai":
        from longreel.parallel.colossalai_engine import ColossalAIEngine

        return ColossalAIEngine(model, mesh, config)
    scaler = torch.amp.GradScaler(mesh.flat.device_type) if config.precision == "fp16" else None
    return Engine(_wrap(model, mesh, config), scaler)


def _wrap(model: DiT, mesh: ParallelMesh, config: ParallelConfig) -> nn.Module:
    """The model under fsdp2 or ddp, gradients averaged over mesh.flat.

    ZeRO-2 keeps parameters gathered between forward and backward, ZeRO-3 gathers them again; both shard gradients
    and optimizer state. The root does not cast its inputs: bf16 would turn timestep 999 into 1000.
    """
    if config.engine == "ddp":
        return DistributedDataParallel(model, process_group=mesh.flat.get_group())
    dtype = DTYPES[config.precision]
    mixed = MixedPrecisionPolicy(cast_forward_inputs=False)
    if config.precision in HALF_PRECISIONS:
        # Gradients are summed over ranks in fp32.
        mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=DTYPES["fp32"], cast_forward_inputs=False)
    reshard = config.engine == "fsdp2-zero3"
    for block in model.blocks:
        fully_shard(block, mesh=mesh.flat, mp_policy=mixed, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh.flat, mp_policy=mixed, reshard_after_forward=reshard)
    return model


def full_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Whole gradients on every rank, gathered from shards, by the model's own parameter names.

    Raises:
        ValueError: a parameter has no gradient.
    """
    grads = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            raise ValueError(f"parameter {name} has no gradient; call backward() first")
        grad = parameter.grad
        grads[plain_name(name)] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return grads


def clip_parts(grads: list[Tensor], max_norm: float | None, *, sharded: bool) -> Tensor:
    """Norm of gradients of which every rank holds parts (or all of them), scaled down in place where above max_norm."""
    norm = torch.nn.utils.get_total_norm(grads)
    if sharded:
        norm = all_reduce_sum(norm.square(), world()).sqrt()
    if max_norm is not None:
        # The small number is that of torch.nn.utils.clip_grads_with_norm_.
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def plain_name(name: str) -> str:
    """A parameter's name in the plain model, from its name under any engine and policy."""
    return name.replace("_checkpoint_wrapped_module.", "").removeprefix("module.")
