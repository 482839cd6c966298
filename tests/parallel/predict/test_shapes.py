"""A step on shapes alone against the same step under PyTorch's own FakeTensorMode: every figure, to the byte."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from longreel.models.config import DiTConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.predict import step
from longreel.parallel.predict.fake_world import fake_world
from longreel.parallel.predict.shapes import ShapesOnly
from longreel.parallel.predict.step import StepTrace


def _trace(mode: Any, model: dict[str, Any], latent_size: tuple[int, int, int], **parallel: Any) -> StepTrace:
    config = DiTConfig(depth=2, hidden_size=256, num_heads=8, **model)
    spread = ParallelConfig(**{"precision": "bf16", "attention_provider": "sdpa-flash"} | parallel)
    with fake_world(8), mock.patch.object(step, "ShapesOnly", mode):
        mesh = build_mesh(sp_degree=spread.sp_degree, ulysses_degree=spread.ulysses_degree)
        open_pointwise = parallel.get("attention_provider") == "torch"
        return step.trace_step(config, spread, mesh, latent_size=latent_size, batch=1, open_pointwise=open_pointwise)


LONG, ODD = (16, 64, 64), (1, 2, 2002)
CROSS = {"conditioning": "cross", "cross_layout": "published"}


@pytest.mark.parametrize(
    ("parallel", "model", "latent_size"),
    [
        pytest.param({"policy": "none", "engine": "fsdp2-zero3"}, {}, LONG, id="local-none-zero3"),
        pytest.param({"strategy": "ulysses", "sp_degree": 8, "policy": "keep_attention"}, {}, LONG, id="ulysses8-keep"),
        pytest.param(
            {"strategy": "fastseq", "sp_degree": 4, "policy": "full", "fastseq_overlap": "attention"},
            CROSS,
            ODD,
            id="fastseq4-full-odd-published",
        ),
        pytest.param({"strategy": "ring", "sp_degree": 4, "policy": "offload"}, {}, LONG, id="ring4-offload"),
        pytest.param(
            {"strategy": "usp", "sp_degree": 4, "ulysses_degree": 2, "policy": "full", "mlp_tile": 1000},
            {"conditioning": "in_context"},
            ODD,
            id="usp4-full-tiled-in-context",
        ),
        pytest.param(
            {"strategy": "ulysses", "sp_degree": 2, "policy": "full", "attention_provider": "torch"},
            {"num_classes": 10},
            (1, 16, 16),
            id="ulysses2-eager",
        ),
    ],
)
def test_equal_to_fake_tensors(parallel: dict[str, Any], model: dict[str, Any], latent_size: Any) -> None:
    found = _trace(ShapesOnly, model, latent_size, **parallel)
    assert found == _trace(FakeTensorMode, model, latent_size, **parallel)
    assert found.peak > found.state > 0


def test_leaves_nothing_behind() -> None:
    before = FSDPParamGroup._validate_no_meta_params
    with ShapesOnly():
        assert torch.zeros(3, 4, device="cpu").device.type == "meta"
        assert torch.ones(2).to("cpu").device.type == "meta"
        assert FSDPParamGroup._validate_no_meta_params is not before
    assert FSDPParamGroup._validate_no_meta_params is before
    assert torch.zeros(1).device.type == "cpu"
