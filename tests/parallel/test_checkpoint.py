"""longreel.parallel.checkpoint: complete or absent, readable by other ranks and engines, damage is named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.parallel.checkpoint import (
    candidates,
    check_whole,
    checkpoints,
    load_checkpoint,
    newest_whole,
    read_run,
    read_weights,
)
from longreel.parallel.checkpoint_files import write_description
from longreel.parallel.checkpoint_writer import CheckpointWriter, prune_checkpoints, remove_unfinished
from longreel.parallel.config import ParallelConfig
from longreel.parallel.ema import ExponentialMovingAverage
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


def save(folder: Path, spread: ParallelDiT, number: int = 1, *, background: bool = False, **described: Any) -> None:
    writer = CheckpointWriter(folder, spread.mesh.flat, keep=9, background=background)
    ema = ExponentialMovingAverage(spread.engine)
    writer.save(number, spread.engine.state() | {"ema": ema.state()}, {"name": "test"}, **described)
    # What is written is what was there at the call.
    with torch.no_grad():
        for parameter in spread.parameters():
            parameter += 1
    writer.close()
    with torch.no_grad():
        for parameter in spread.parameters():
            parameter -= 1


def save_on_ranks(folder: Path, config: ParallelConfig, background: bool = False) -> dict[str, Tensor]:
    spread, optimizer = build(config, seed=0)
    step(spread)
    state = whole_state(spread, optimizer)
    save(folder, spread, background=background)
    return state


def load_on_ranks(folder: Path, config: ParallelConfig) -> dict[str, Tensor]:
    spread, optimizer = build(config, seed=1)
    ema = ExponentialMovingAverage(spread.engine)
    checkpoint, _ = newest_whole(candidates(folder), spread.mesh.flat)
    state = spread.engine.state() | {"ema": ema.state()}
    load_checkpoint(checkpoint, state)
    spread.engine.load_state(state)
    ema.load_state(state["ema"])
    loaded = whole_state(spread, optimizer)
    for name, average in ema.state().items():
        whole = average.full_tensor() if isinstance(average, DTensor) else average
        assert torch.equal(whole, loaded[name]), name
    return loaded


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
    saved = run_distributed(save_on_ranks, SAVERS[saver][0], tmp_path, SAVERS[saver][1], True)[0]
    loaded = run_distributed(load_on_ranks, SAVERS[loader][0], tmp_path, SAVERS[loader][1])[0]
    assert saved.keys() == loaded.keys()
    assert any(name.endswith("/exp_avg_sq") for name in saved)
    assert any(name.endswith("/step") for name in saved)
    assert not any("_checkpoint_wrapped_module" in name or "module." in name for name in saved)
    for name, value in saved.items():
        assert torch.equal(loaded[name], value), name
    alone = read_weights(candidates(tmp_path)[-1], "ema")
    assert alone.keys() < saved.keys()
    for name, value in alone.items():
        assert torch.equal(value, saved[name]), name


def scale_after_overflow(folder: Path) -> float | None:
    spread, _ = build(ParallelConfig(precision="fp16"), seed=0)
    step(spread)
    next(spread.parameters()).grad = torch.full_like(next(spread.parameters()), float("inf"))
    assert spread.engine.scaler is not None
    # As if the overflow were that of the step's own gradients.
    spread.engine.scaler.scale(torch.zeros(()))
    spread.engine.step()
    save(folder, spread, 2)
    return spread.engine.loss_scale


def test_an_fp16_run_goes_on_with_its_loss_scale(tmp_path: Path) -> None:
    with process_group():
        scale = scale_after_overflow(tmp_path)
        resumed, _ = build(ParallelConfig(precision="fp16"), seed=1)
        fresh = resumed.engine.loss_scale
        state = resumed.engine.state()
        load_checkpoint(candidates(tmp_path)[-1], state)
        resumed.engine.load_state(state)
        assert scale == resumed.engine.loss_scale == 2.0**15
        assert fresh == 2.0**16


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with process_group():
        save_on_ranks(tmp_path / "checkpoints", ParallelConfig())
    return tmp_path / "checkpoints" / "step-000001"


def test_saved_folder_is_found_and_described(saved: Path) -> None:
    for path in (saved, saved.parent, saved.parent.parent):
        assert candidates(path) == [saved]
    assert read_run(saved) == (1, {"name": "test"})
    assert [p.name for p in saved.parent.iterdir()] == ["step-000001"]


def test_newest_is_by_number_and_unfinished_ones_do_not_count(tmp_path: Path) -> None:
    for name in ("step-000900", "step-1000000", "step-000020", ".step-2000000.partial", "step-x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000020", "step-000900", "step-1000000"]
    prune_checkpoints(tmp_path, 1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-1000000"]
    assert (tmp_path / ".step-2000000.partial").exists()


@pytest.mark.parametrize("background", [False, True])
def test_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with process_group():
        spread, _ = build(ParallelConfig(), seed=0)
        step(spread)
        save(tmp_path, spread, 1)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "save", full_disk)
            with pytest.raises(OSError, match=r"cannot write the checkpoint: .*No space left"):
                save(tmp_path, spread, 2, background=background)
        assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
        check_whole(tmp_path / "step-000001", spread.mesh.flat)
        save(tmp_path, spread, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000001", "step-000002"]


def test_a_full_disk_is_named_where_the_writer_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> None:
        # What torch.save says when a file took less than was written.
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    with process_group():
        spread, _ = build(ParallelConfig(), seed=0)
        monkeypatch.setattr(torch, "save", lost)
        with pytest.raises(OSError, match=r"cannot write the checkpoint: \[enforce fail"):
            save(tmp_path, spread, 1)
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4096))
        with pytest.raises(OSError, match=r"the checkpoint: No space left on the disk \(\[enforce fail"):
            save(tmp_path, spread, 1)


def test_a_failed_save_in_the_background_does_not_cost_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with process_group():
        spread, _ = build(ParallelConfig(), seed=0)
        writer = CheckpointWriter(tmp_path, spread.mesh.flat, keep=9)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "save", full_disk)
            writer.save(1, spread.engine.state(), {})
            assert writer._thread is not None
            writer._thread.join()
        with pytest.raises(OSError, match="No space left"):
            writer.save(2, spread.engine.state(), {})
        writer.close()
        check_whole(tmp_path / "step-000002", spread.mesh.flat)


def test_writing_waits_for_no_stream_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream() -> None:
        raise AssertionError("the thread of checkpoints asked for a stream, which would be that of the first device")

    with process_group():
        spread, _ = build(ParallelConfig(), seed=0)
        step(spread)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", stream)
        save(tmp_path, spread, 1)
        monkeypatch.undo()
        check_whole(tmp_path / "step-000001", spread.mesh.flat)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for number, score in ((1, 0.5), (2, 0.1), (3, None), (4, 0.3), (5, 0.4)):
        folder = tmp_path / f"step-{number:06d}"
        folder.mkdir()
        write_description(folder, {"version": 2, "step": number, "config": {}, "files": {}, "score": score})
    prune_checkpoints(tmp_path, 2, keep_best=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000004", "step-000005"]
    prune_checkpoints(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000005"]


def test_a_checkpoint_that_was_to_be_replaced_gets_its_name_back(tmp_path: Path) -> None:
    for name in ("step-000001", ".step-000001.replaced", ".step-000002.replaced", ".step-000003.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of").write_text(name)
    remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert (tmp_path / "step-000001" / "of").read_text() == "step-000001"
    assert (tmp_path / "step-000002" / "of").read_text() == ".step-000002.replaced"


def test_left_over_partial_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".step-000001.partial").mkdir()
    (tmp_path / ".step-000001.partial" / "rubbish").write_text("")
    with process_group():
        save_on_ranks(tmp_path, ParallelConfig())
    assert not (tmp_path / "step-000001" / "rubbish").exists()


def load_here(checkpoint: Path, hidden_size: int = 32) -> None:
    with process_group():
        spread, _ = build(ParallelConfig(), seed=0, hidden_size=hidden_size)
        check_whole(checkpoint, spread.mesh.flat)
        load_checkpoint(checkpoint, spread.engine.state())


def test_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="does not fit this model or is damaged") as raised:
        load_here(saved, hidden_size=64)
    assert "\n" not in str(raised.value)


def flip(path: Path, place: int) -> None:
    """Turn one bit of a byte over, counted from the end where negative."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing-shard": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "cut-shard": lambda folder: os.truncate(next(folder.glob("*.distcp")), 1000),
    "flipped-tensor": lambda folder: flip(next(folder.glob("*.distcp")), -2000),
    "flipped-index": lambda folder: flip(folder / ".metadata", 500),
    "missing-index": lambda folder: (folder / ".metadata").unlink(),
    "flipped-description": lambda folder: flip(folder / "run.json", 40),
    "missing-description": lambda folder: (folder / "run.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_newest_whole_checkpoint_taken(saved: Path, tmp_path: Path, damage: str) -> None:
    newer = saved.with_name("step-000002")
    shutil.copytree(saved, newer)
    DAMAGES[damage](newer)
    with process_group():
        mesh = build_mesh(sp_degree=1).flat
        with pytest.raises(ValueError, match=r"step-000002.*(damaged|not a checkpoint)") as raised:
            check_whole(newer, mesh)
        assert "\n" not in str(raised.value)
        assert newest_whole([saved, newer], mesh) == (saved, [str(raised.value)])
        with pytest.raises(ValueError, match="step-000002"):
            newest_whole([newer], mesh)


def find_whole(folder: Path) -> tuple[Path, list[str]]:
    return newest_whole(candidates(folder), build_mesh(sp_degree=1).flat)


def test_ranks_share_the_reading_and_agree(tmp_path: Path, run_distributed: Any) -> None:
    run_distributed(save_on_ranks, 2, tmp_path, ParallelConfig())
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000002")
    flip(tmp_path / "step-000002" / "__1_0.distcp", -1000)
    whole, damages = run_distributed(find_whole, 2, tmp_path)[1]
    assert whole == tmp_path / "step-000001"
    assert damages == [f"{tmp_path}/step-000002/__1_0.distcp: damaged: its bytes are not those that were written"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint there; give a folder"):
        candidates(tmp_path)
