"""longreel.parallel.checkpoint: complete or absent, readable by other ranks and engines, damage is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.parallel.checkpoint import (
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    read_run,
    save_checkpoint,
)
from longreel.parallel.config import ParallelConfig
from longreel.parallel.launch import process_group
from longreel.parallel.mesh import build_mesh
from longreel.parallel.parallelize import Batch, ParallelDiT

WHOLE = StateDictOptions(full_state_dict=True)


def build(config: ParallelConfig, *, seed: int, hidden_size: int = 32) -> tuple[ParallelDiT, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = DiT(DiTConfig(depth=1, hidden_size=hidden_size, num_heads=4, text_dim=8, max_text_tokens=4))
    spread = ParallelDiT(model, build_mesh(sp_degree=config.sp_degree), config)
    optimizer = torch.optim.AdamW(spread.parameters(), lr=1e-2)
    spread.engine.attach(optimizer)
    return spread, optimizer


def step(spread: ParallelDiT) -> None:
    torch.manual_seed(7)
    draws = {"latents": torch.randn(1, 1, 8, 8, 4), "noise": torch.randn(1, 1, 8, 8, 4), "text": torch.randn(1, 4, 8)}
    spread.engine.backward(spread.loss(Batch(**draws, timestep=torch.tensor([0.5]), global_samples=1)))
    spread.engine.step()


def whole_state(spread: ParallelDiT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every parameter and optimizer tensor, unsharded, under names that no engine or policy changes."""
    flat = dict(get_model_state_dict(spread.module, options=WHOLE))
    moments = get_optimizer_state_dict(spread.module, optimizer, options=WHOLE)["state"]
    flat |= {f"{name}/{kind}": value for name, state in moments.items() for kind, value in state.items()}  # type: ignore[union-attr]
    return {name: value.clone() for name, value in flat.items()}


def save_on_ranks(folder: Path, config: ParallelConfig) -> dict[str, Tensor]:
    spread, optimizer = build(config, seed=0)
    step(spread)
    save_checkpoint(folder, 1, spread.engine, {"name": "test"}, spread.mesh.flat)
    return whole_state(spread, optimizer)


def load_on_ranks(folder: Path, config: ParallelConfig) -> dict[str, Tensor]:
    spread, optimizer = build(config, seed=1)
    load_checkpoint(find_checkpoint(folder), spread.engine)
    return whole_state(spread, optimizer)


SAVERS = {
    "zero2-2ranks": (2, ParallelConfig(strategy="ulysses", sp_degree=2)),
    "ddp-2ranks": (2, ParallelConfig(engine="ddp")),
    "zero3-4ranks-full": (4, ParallelConfig(strategy="fastseq", sp_degree=2, engine="fsdp2-zero3", policy="full")),
}


@pytest.mark.parametrize("loader", SAVERS)
@pytest.mark.parametrize("saver", SAVERS)
def test_any_ranks_engine_and_policy_read_what_any_other_wrote(
    tmp_path: Path, run_distributed: Any, saver: str, loader: str
) -> None:
    saved = run_distributed(save_on_ranks, SAVERS[saver][0], tmp_path, SAVERS[saver][1])[0]
    loaded = run_distributed(load_on_ranks, SAVERS[loader][0], tmp_path, SAVERS[loader][1])[0]
    assert saved.keys() == loaded.keys()
    assert any(name.endswith("/exp_avg_sq") for name in saved)
    assert any(name.endswith("/step") for name in saved)
    assert not any("_checkpoint_wrapped_module" in name or "module." in name for name in saved)
    for name, value in saved.items():
        assert torch.equal(loaded[name], value), name


def scale_after_overflow(folder: Path) -> float | None:
    spread, _ = build(ParallelConfig(precision="fp16"), seed=0)
    step(spread)
    next(spread.parameters()).grad = torch.full_like(next(spread.parameters()), float("inf"))
    assert spread.engine.scaler is not None
    # As if the overflow were that of the step's own gradients.
    spread.engine.scaler.scale(torch.zeros(()))
    spread.engine.step()
    save_checkpoint(folder, 2, spread.engine, {}, spread.mesh.flat)
    return spread.engine.loss_scale


def test_an_fp16_run_goes_on_with_its_loss_scale(tmp_path: Path) -> None:
    with process_group():
        scale = scale_after_overflow(tmp_path)
        resumed, _ = build(ParallelConfig(precision="fp16"), seed=1)
        fresh = resumed.engine.loss_scale
        load_checkpoint(find_checkpoint(tmp_path), resumed.engine)
        assert scale == resumed.engine.loss_scale == 2.0**15
        assert fresh == 2.0**16


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with process_group():
        save_on_ranks(tmp_path / "checkpoints", ParallelConfig())
    return tmp_path / "checkpoints" / "step-000001"


def test_saved_folder_is_found_and_described(saved: Path) -> None:
    for path in (saved, saved.parent, saved.parent.parent):
        assert find_checkpoint(path) == saved
    assert read_run(saved) == (1, {"name": "test"})
    assert [p.name for p in saved.parent.iterdir()] == ["step-000001"]


def test_newest_is_by_number_and_unfinished_ones_do_not_count(tmp_path: Path) -> None:
    for name in ("step-000900", "step-1000000", "step-000020", ".step-2000000.partial", "step-x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000020", "step-000900", "step-1000000"]
    prune_checkpoints(tmp_path, 1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-1000000"]
    assert (tmp_path / ".step-2000000.partial").exists()


def test_write_that_fails_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with process_group(), pytest.raises(OSError, match=r"step-000001: cannot write the checkpoint: .*No space left"):
        save_on_ranks(tmp_path, ParallelConfig())
    assert checkpoints(tmp_path) == []


def test_left_over_partial_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".step-000001.partial").mkdir()
    (tmp_path / ".step-000001.partial" / "rubbish").write_text("")
    with process_group():
        save_on_ranks(tmp_path, ParallelConfig())
    assert not (tmp_path / "step-000001" / "rubbish").exists()


def load_here(checkpoint: Path, hidden_size: int = 32) -> None:
    with process_group():
        spread, _ = build(ParallelConfig(), seed=0, hidden_size=hidden_size)
        load_checkpoint(checkpoint, spread.engine)


def test_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="does not fit this model or is damaged") as raised:
        load_here(saved, hidden_size=64)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", ["missing-shard", "cut-shard", "empty-shard"])
def test_damaged_tensors_are_refused(saved: Path, damage: str) -> None:
    shard = next(saved.glob("*.distcp"))
    if damage == "missing-shard":
        shard.unlink()
    elif damage == "cut-shard":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        shard.write_bytes(b"")
    with pytest.raises(ValueError, match=r"step-000001: does not fit this model or is damaged: \S") as raised:
        load_here(saved)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"garbage", b"\x80\x04", b"not a pickle\n" * 50, pickle.dumps({"no": "index"}), bytes(range(256))],
    ids=["missing", "empty", "word", "cut", "text", "another-pickle", "bytes"],
)
def test_damaged_index_is_refused_without_a_log(
    saved: Path, content: bytes | None, capfd: pytest.CaptureFixture[str]
) -> None:
    index = saved / ".metadata"
    index.unlink() if content is None else index.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-000001/\.metadata: (missing or )?damaged: \S") as raised:
        load_here(saved)
    assert "\n" not in str(raised.value)
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"version": 1}', "run.json: damaged: step is missing"),
        ('{"version": 1, "step": "five", "config": {}}', "run.json: damaged: step: expected a count, got 'five'"),
        ('{"version": 1, "step": 5, "config": []}', "run.json: damaged: config: expected an object"),
        (json.dumps({"version": 99, "step": 1, "config": {}}), "checkpoint version 99, this version reads 1"),
        (None, r"not a checkpoint, run\.json is missing"),
    ],
    ids=["cut", "list", "keys", "step", "config", "version", "missing"],
)
def test_damaged_description_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint there; give a folder"):
        find_checkpoint(tmp_path)
