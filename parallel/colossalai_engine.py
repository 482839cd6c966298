"""Engine `colossalai`: Booster with LowLevelZeroPlugin, ZeRO stage 2, over all dp x sp ranks.

Each rank keeps whole parameters in the compute dtype, and of every parameter, flattened and padded to a multiple of
the ranks, an fp32 master, its optimizer state and its gradient for one equal part. Gradients are averaged by
reduce-scatter in buckets during backward, parameters gathered after the step.
Source: colossalai 0.5.0, booster/plugin/low_level_zero_plugin.py and zero/low_level/low_level_optim.py.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from longreel.models.dit import DiT
from longreel.parallel.comm import all_gather
from longreel.parallel.config import ParallelConfig
from longreel.parallel.engine import Engine, clip_parts, plain_name
from longreel.parallel.mesh import ParallelMesh

if TYPE_CHECKING:
    from colossalai.booster.plugin import LowLevelZeroPlugin
    from colossalai.zero import LowLevelZeroOptimizer

INSTALL = "make setup-colossalai"


class ColossalAIEngine(Engine):
    """A model and its optimizer under ColossalAI.

    Args:
        model: whole, on this rank's device, in the dtype of its master parameters.
        mesh: its ranks must be those of the default process group, which is the plugin's.
        config: precision `bf16` computes in bf16 over fp32 masters; `fp32` and `fp64` as they say, but masters, and so
            what a step does to a parameter, are fp32 there too.

    Raises:
        ValueError: ColossalAI is not installed, or the ranks are not on CUDA devices.
    """

    def __init__(self, model: DiT, mesh: ParallelMesh, config: ParallelConfig) -> None:
        booster, plugin_class, accelerator = _import_colossalai()
        device = mesh.flat.device_type
        if accelerator.name != "cuda" or accelerator.get_current_device().type != device:
            raise ValueError(
                f"engine 'colossalai' needs a CUDA device, got {device!r}: LowLevelZeroPlugin refuses others; "
                "use engine fsdp2-zero2"
            )
        # It calls collectives by names that PyTorch 2.13 gave up, and PyTorch says so on every rank.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        # The plugin shards over the default group, in its order of ranks.
        assert mesh.flat.size() == dist.get_world_size() and mesh.flat.get_local_rank() == dist.get_rank()
        self._group = mesh.flat.get_group().group_name
        bf16 = config.precision == "bf16"
        self._plugin: LowLevelZeroPlugin = plugin_class(
            stage=2,
            precision="bf16" if bf16 else "fp32",
            # As under fsdp2: gradients are summed over ranks in fp32, and timestep 999 does not become 1000.
            communication_dtype=torch.float32 if bf16 else None,
            cast_inputs=False,
            overlap_communication=device == "cuda",
        )
        # The plugin would make masters from parameters that are rounded to bf16 by then.
        self._initial = {name: self._part(p.detach()) for name, p in model.named_parameters()} if bf16 else {}
        self._booster = booster(plugin=self._plugin)
        self._zero: LowLevelZeroOptimizer | None = None
        super().__init__(self._booster.boost(model)[0])

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Shard the optimizer; its param_groups stay the place for learning rates, its step() is the engine's business.

        Args:
            optimizer: over all parameters of `module`, before its first step.
        """
        super().attach(optimizer)
        self._zero = self._booster.boost(self.module, optimizer)[1]
        for name, parameter in self._named_parameters().items():
            if name in self._initial:
                self._master(parameter).copy_(self._initial[name])
        self._initial = {}

    def backward(self, loss: Tensor) -> None:
        """Backward, and the average of gradients over all ranks."""
        self._booster.backward(loss, self._sharded)

    def step(self) -> None:
        """One optimizer step; gradients are gone after it."""
        self._sharded.step()
        self._sharded.zero_grad()

    def clip(self, max_norm: float | None) -> Tensor:
        """See Engine."""
        parts = [self._sharded.get_working_grad_by_param_id(id(p)) for p in self.module.parameters()]
        return clip_parts([part for part in parts if part is not None], max_norm, sharded=True)

    def masters(self) -> dict[str, Tensor]:
        """See Engine: fp32, a part of each."""
        return {name: self._master(parameter) for name, parameter in self._named_parameters().items()}

    def whole_masters(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """See Engine."""
        return {name: self._whole(parts[name], parameter) for name, parameter in self._named_parameters().items()}

    def parts_of_masters(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """See Engine."""
        return {name: self._part(tensor) for name, tensor in whole.items()}

    def full_gradients(self) -> dict[str, Tensor]:
        """See Engine."""
        grads = {}
        for name, parameter in self._named_parameters().items():
            # The gradient that the plugin holds, a part on each rank.
            part = self._sharded.get_working_grad_by_param_id(id(parameter))
            if part is None:
                raise ValueError(f"parameter {name} has no gradient; call backward() first")
            grads[name] = self._whole(part, parameter)
        return grads

    def state(self) -> dict[str, Any]:
        """See Engine. Every rank holds all of it: 12 bytes per parameter with AdamW's moments."""
        named = self._named_parameters()
        if self._zero is None or self.optimizer is None:
            return {"model": {name: p.detach().clone() for name, p in named.items()}}
        model, moments = {}, {}
        for name, parameter in named.items():
            master = self._master(parameter)
            model[name] = self._whole(master, parameter)
            parts = self.optimizer.state.get(master) or _fresh_state(self.optimizer, master)
            moments[name] = {
                kind: self._whole(part, parameter) if part.dim() else part.clone() for kind, part in parts.items()
            }
        groups = [group | {"params": list(named)} for group in self.optimizer.param_groups]
        return {"model": model, "optimizer": {"state": moments, "param_groups": groups}}

    def load_state(self, state: dict[str, Any]) -> None:
        """See Engine."""
        named = self._named_parameters()
        with torch.no_grad():
            for name, parameter in named.items():
                whole = state["model"][name]
                parameter.copy_(whole)
                if self._zero is not None:
                    self._master(parameter).copy_(self._part(whole))
        if self._zero is None or self.optimizer is None:
            return
        for name, parameter in named.items():
            master = self._master(parameter)
            saved = state["optimizer"]["state"][name]
            self.optimizer.state[master] = {
                kind: self._part(value).to(master.device) if value.dim() else value.clone()
                for kind, value in saved.items()
            }
        (group,), (loaded,) = self.optimizer.param_groups, state["optimizer"]["param_groups"]
        group.update({key: value for key, value in loaded.items() if key != "params"})

    @property
    def _sharded(self) -> LowLevelZeroOptimizer:
        if self._zero is None:
            raise ValueError("engine 'colossalai' reduces gradients in its optimizer; call attach(optimizer) first")
        return self._zero

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        return {plain_name(name): parameter for name, parameter in self.module.named_parameters()}

    def _master(self, parameter: nn.Parameter) -> Tensor:
        master: Tensor = self._sharded.get_working_to_master_map()[id(parameter)]
        return master

    def _part(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, flattened and padded as the plugin does: a copy."""
        ranks = dist.get_world_size()
        padded = F.pad(whole.flatten(), (0, -whole.numel() % ranks))
        return padded.chunk(ranks)[dist.get_rank()].clone()

    def _whole(self, part: Tensor, parameter: nn.Parameter) -> Tensor:
        flat = all_gather(part.detach().flatten().contiguous(), self._group).flatten()
        return flat[: parameter.numel()].view(parameter.shape)


def _fresh_state(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """AdamW's state before the first step."""
    assert isinstance(optimizer, torch.optim.AdamW), type(optimizer)
    zeros = torch.zeros_like(master)
    return {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def _import_colossalai() -> tuple[Any, Any, Any]:
    """(Booster, LowLevelZeroPlugin, the accelerator ColossalAI found), imported without advice on other packages."""
    quiet = logging.getLogger("bitsandbytes")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from colossalai.accelerator import get_accelerator
            from colossalai.booster import Booster
            from colossalai.booster.plugin import LowLevelZeroPlugin
    except ImportError as error:
        raise ValueError(
            f"engine 'colossalai' cannot be imported ({error}); install it with: {INSTALL}, or use engine fsdp2-zero2"
        ) from error
    finally:
        quiet.setLevel(level)
    return Booster, LowLevelZeroPlugin, get_accelerator()
