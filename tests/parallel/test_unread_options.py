"""Options that would be accepted and not read are refused: each error names the option, its value, and what works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreel.data.prepare_config import PrepareConfig
from longreel.models.autoencoders import AutoencoderConfig
from longreel.models.objective import ObjectiveConfig
from longreel.models.text import TextEncoderConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.export import ExportConfig
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.optimizer_config import OptimizerConfig
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.sample_config import SampleConfig

HERE = Path("x")


def sampled(**fields: Any) -> SampleConfig:
    return SampleConfig(checkpoint=HERE, prompt=("x",), **fields)


def prepared(**fields: Any) -> PrepareConfig:
    return PrepareConfig(videos=HERE, captions=HERE, out=HERE, **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda: ObjectiveConfig(min_weighed_t=0.5),
            "min_weighed_t 0.5 .* has no effect on prediction 'velocity'; use prediction x0, or leave it at 0.05",
            id="min-weighed-t",
        ),
        pytest.param(
            lambda: ObjectiveConfig(objective="ddpm", min_weighed_t=0.5),
            "min_weighed_t 0.5 .* has no effect",
            id="min-weighed-t-ddpm",
        ),
        pytest.param(
            lambda: sampled(guidance=1.0, guided_channels=3),
            "guided_channels 3 has no effect at guidance 1",
            id="guided-channels",
        ),
        pytest.param(
            lambda: sampled(parallel=ParallelConfig(policy="full")),
            "policy 'full' saves memory for backward, which sampling has none of; leave it out",
            id="policy",
        ),
        pytest.param(
            lambda: ModelChoice(dit="dit-s-2", depth=4),
            "depth 4 has no effect with dit 'dit-s-2', whose own counts; leave one of them out",
            id="depth",
        ),
        pytest.param(
            lambda: OptimizerConfig(min_learning_rate=1e-5),
            "min_learning_rate 1e-05 goes with schedule 'cosine'",
            id="min-learning-rate",
        ),
        pytest.param(
            lambda: ParallelConfig(fastseq_overlap="attention"),
            "fastseq_overlap 'attention' goes with strategy 'fastseq', got strategy 'local'",
            id="overlap",
        ),
        pytest.param(
            lambda: TrainConfig(demo=True, grouping="buckets"),
            "grouping 'buckets' goes with --shards or --native-sizes",
            id="grouping",
        ),
        pytest.param(
            lambda: TrainConfig(demo=True, profile_steps=(5, 6)),
            "profile_steps 5 6 goes with --profile",
            id="profile-steps",
        ),
        pytest.param(
            lambda: AutoencoderConfig(frame_batch=2), "frame_batch 2 has no effect with autoencoder 'raw'", id="frames"
        ),
        pytest.param(
            lambda: AutoencoderConfig(autoencoder_dtype="bf16"),
            "autoencoder_dtype bf16 has no effect with autoencoder 'raw'",
            id="autoencoder-dtype",
        ),
        pytest.param(
            lambda: TextEncoderConfig(text_batch=2),
            "text_batch 2 has no effect with text_encoder 'bytes'; leave it out",
            id="text-batch",
        ),
        pytest.param(
            lambda: TextEncoderConfig(text_encoder="t5", text_path="x", text_dim=64),
            "text_dim 64 has no effect with text_encoder 't5'; leave it out",
            id="text-dim",
        ),
        pytest.param(
            lambda: prepared(latent_dtype="bf16"),
            "latent_dtype bf16 has no effect with autoencoder 'raw'",
            id="latent-dtype",
        ),
        pytest.param(
            lambda: ExportConfig(original=HERE, autoencoder_path="x", weights="model"),
            "weights 'model' is a choice of --checkpoint",
            id="weights",
        ),
    ],
)
def test_an_option_without_effect_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_where_they_are_read_they_are_taken() -> None:
    ObjectiveConfig(prediction="x0", min_weighed_t=0.5)
    sampled(guidance=2.0, guided_channels=3)
    OptimizerConfig(schedule="cosine", min_learning_rate=1e-5)
    ParallelConfig(strategy="fastseq", sp_degree=2, fastseq_overlap="attention")
    TrainConfig(shards=HERE, token_budget=9, grouping="buckets")
    TrainConfig(demo=True, profile=HERE, profile_steps=(5, 6))
    AutoencoderConfig(autoencoder="vqvae", autoencoder_path="x", frame_batch=2, autoencoder_dtype="bf16")
    TextEncoderConfig(text_encoder="t5", text_path="x", text_batch=2)
    prepared(latent_dtype="bf16", text=TextEncoderConfig(text_encoder="t5", text_path="x"))
