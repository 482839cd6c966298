"""What a model learns: the contract between an objective, the training loss and the samplers; and the two there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from longreel.models.diffusion import Diffusion
from longreel.models.flow import MIN_WEIGHED_T, FlowPrediction, RectifiedFlow, TimestepDistribution

ObjectiveName = Literal["flow", "ddpm"]


class Objective(Protocol):
    """Noise that is put on data, and the loss of what a model says about it, per token.

    Shapes: B samples, v tokens, n elements of a patch (volume x C_in, or [volume, C] where written so).
    """

    @property
    def learn_sigma(self) -> bool:
        """Whether the model predicts a variance beside each data channel."""
        ...

    def draw_timestep(self, generator: torch.Generator) -> Tensor:
        """One training timestep, [1], fp32, in the objective's own units: what Batch.timestep holds."""
        ...

    def model_timestep(self, t: Tensor) -> Tensor:
        """What the model's embedding is given for t [B]: in [0, 1000)."""
        ...

    def prepare(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Noised patches [B, v, n] and what token_loss needs of the data, each [B, v, n], from x0, noise [B, v, n]."""
        ...

    def token_loss(self, output: Tensor, targets: tuple[Tensor, ...], t: Tensor) -> Tensor:
        """Loss of each token, [B, v]: the mean over its elements.

        Args:
            output: [B, v, volume, C_out] of the model. targets: of prepare, as [B, v, volume, C_in]. t: [B].
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What a model learns.

    Args:
        objective: `flow` (rectified flow) or `ddpm` (1000 steps, epsilon with learned sigma, as the original DiT).
        prediction: of `flow`: `velocity`, or `x0`, which large patches on a narrow model need.
        timesteps: of `flow`, how training draws them: `uniform` or `logit-normal`, which favours the middle.
        timestep_shift: of `flow`: above 1 moves timesteps of training and sampling towards noise, where the layout is
            decided; the more, the more numbers a patch or clip has.
        min_weighed_t: of prediction `x0`: its error weighs 1 / max(t, this)^2.
    """

    objective: ObjectiveName = "flow"
    prediction: FlowPrediction = "velocity"
    timesteps: TimestepDistribution = "uniform"
    timestep_shift: float = 1.0
    min_weighed_t: float = MIN_WEIGHED_T

    def __post_init__(self) -> None:
        if self.objective not in get_args(ObjectiveName):
            raise ValueError(f"objective must be one of {', '.join(get_args(ObjectiveName))}; got {self.objective!r}")
        of_flow = (self.prediction, self.timesteps, self.timestep_shift)
        if self.objective == "ddpm" and of_flow != ("velocity", "uniform", 1.0):
            raise ValueError(
                "prediction, timesteps and timestep_shift are choices of objective flow, and --demo and presets set"
                " some; ddpm predicts epsilon at uniform timesteps: give --prediction velocity --timesteps uniform "
                f"--timestep-shift 1 --min-weighed-t {MIN_WEIGHED_T} with it, got {' '.join(map(str, of_flow))}"
            )
        if self.prediction != "x0" and self.min_weighed_t != MIN_WEIGHED_T:
            raise ValueError(
                f"min_weighed_t {self.min_weighed_t} weighs the error of prediction 'x0' and has no effect on "
                f"prediction {self.prediction!r}; use prediction x0, or leave it at {MIN_WEIGHED_T}"
            )
        self.build()

    def build(self) -> Objective:
        """The objective itself."""
        if self.objective == "ddpm":
            return Diffusion()
        return RectifiedFlow(
            prediction=self.prediction,
            distribution=self.timesteps,
            shift=self.timestep_shift,
            min_weighed_t=self.min_weighed_t,
        )
