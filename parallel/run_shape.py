"""The shapes of a run's micro-batch, known before there are ranks: what memory is predicted for."""

from __future__ import annotations

from dataclasses import dataclass

from longreel.data.shards import ShardDataset
from longreel.models.autoencoders import build_autoencoder
from longreel.models.config import DiTConfig
from longreel.models.text import build_text_encoder
from longreel.parallel.run_config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunShape:
    """One micro-batch of one data-parallel group.

    Args:
        model: trained. grid: patches (t, h, w) of a sample; a full group of clips as one long one. batch: samples.
    """

    model: DiTConfig
    grid: tuple[int, int, int]
    batch: int


def run_shape(config: TrainConfig, dp_degree: int) -> RunShape:
    """The largest micro-batch of a run on dp_degree data-parallel groups.

    Raises:
        ValueError: sizes that do not fit, or shards and encoders that are not there.
    """
    learn_sigma = config.objective.build().learn_sigma
    if config.shards is not None:
        info = ShardDataset(config.shards).info
        model = config.model.build(
            in_channels=info["channels"],
            raw=info["compression"]["autoencoder"] == "raw",
            learn_sigma=learn_sigma,
            text_dim=info["text_dim"],
            max_text_tokens=info["max_text_tokens"],
        )
    else:
        autoencoder = build_autoencoder(config.compression)
        model = config.dit(autoencoder, build_text_encoder(config.text))
        if not config.native_sizes:
            samples = -(-config.batch_size // dp_degree)
            batch = -(-samples // config.optimizer.accumulation)
            return RunShape(model=model, grid=model.grid(*config.latent_size(autoencoder)), batch=batch)
    assert config.token_budget is not None
    return RunShape(model=model, grid=(config.token_budget, 1, 1), batch=1)
