"""longreel.bench.engine_steps: ColossalAI's ZeRO-2 beside fsdp2's, on gloo ranks with a CPU that answers to cuda."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longreel.bench import engine_steps
from longreel.bench.engine_steps import PAIR, EngineConfig, Trained, lines, loss_difference, records
from longreel.models.config import DiTConfig

installed = pytest.mark.skipif(
    importlib.util.find_spec("colossalai") is None, reason="ColossalAI is not installed: make setup-colossalai"
)
TINY = DiTConfig(depth=2, hidden_size=32, num_heads=4, conditioning="cross", text_dim=16, max_text_tokens=8)
FOUND = {
    "fsdp2-zero2": Trained(losses=[2.0, 1.0], memory={"allocated": 2**30}, samples_s=[1.0] * 6),
    "colossalai": Trained(losses=[2.0, 1.00001], memory={"allocated": 2**31}, samples_s=[1.5] * 6),
}


def config(**fields: Any) -> EngineConfig:
    given = {"out": Path("unused"), "seq_len": 32, "precision": "fp32", "attention": "torch", "steps": 3, "rounds": 2}
    return EngineConfig(**(given | fields))


def both_engines(wanted: EngineConfig) -> tuple[dict[str, Trained], list[Any]]:
    """In a worker."""
    import cpu_accelerator

    cpu_accelerator.use()
    device = torch.device("cpu")
    found = engine_steps.compare_engines(wanted, TINY, device)
    return found, records(wanted, TINY, found, device, {"commit": "0" * 40, "environment": {}})  # type: ignore[return-value]


@installed
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_both_engines_train_alike_and_become_records(ranks: int, run_distributed: Callable[..., list[Any]]) -> None:
    (found, made), *_ = run_distributed(both_engines, ranks, config())
    assert [len(found[engine].losses) for engine in PAIR] == [3, 3]
    assert [len(found[engine].samples_s) for engine in PAIR] == [2, 2]
    # The same model on the same data: it learns, and alike.
    assert found[PAIR[0]].losses[-1] < found[PAIR[0]].losses[0]
    assert loss_difference(found) < 1e-5
    assert [(r.engine, r.is_baseline, r.status, r.num_devices) for r in made] == [
        ("fsdp2-zero2", True, "ok", ranks),
        ("colossalai", False, "ok", ranks),
    ]


def test_records_say_loss_speed_and_memory() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ours, theirs = records(config(), TINY, FOUND, torch.device("cpu"), {})  # type: ignore[arg-type]
    finally:
        torch.distributed.destroy_process_group()
    assert (ours.step_s, theirs.step_s, theirs.memory) == (1.0, 1.5, {"allocated": 2**31})
    assert theirs.error["loss"] == pytest.approx(1e-5) and theirs.provenance["losses"] == [2.0, 1.00001]
    assert (theirs.status, theirs.comparison["verdict"], theirs.comparison["ratio"]) == ("ok", "SLOW", 1.5)
    assert not ours.comparison
    told = lines(FOUND, 1e-4)  # type: ignore[arg-type]
    assert told[1] == "colossalai   loss 2.00000 to 1.00001, 1500.0 ms a step, peak 2.00 GiB"
    assert "time 1.500" in told[2] and told[2].endswith("loss differs by 1.0e-05 at most")


def test_losses_that_differ_by_more_than_rounding_are_wrong() -> None:
    off = FOUND | {"colossalai": Trained(losses=[2.0, 1.02], samples_s=[0.5] * 6)}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for precision, status in (("fp32", "wrong"), ("bf16", "wrong")):
            ours, theirs = records(config(precision=precision), TINY, off, torch.device("cpu"), {})  # type: ignore[arg-type]
            assert (ours.status, theirs.status, theirs.comparison) == ("ok", status, {})
            assert theirs.reason is not None and "loss differs by 2.0e-02" in theirs.reason
    finally:
        torch.distributed.destroy_process_group()
    assert lines(off, 1e-2)[2].endswith(": WRONG, more than 1e-02")  # type: ignore[arg-type]


@pytest.mark.parametrize(("field", "value"), [("seq_len", 0), ("steps", 0), ("rounds", 0), ("depth", 0)])
def test_bad_input_names_the_argument(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        config(**{field: value})


def test_without_a_gpu_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = ["--out", str(tmp_path), "--model", "dit-s-4", "--depth", "1", "--seq-len", "16", "--steps", "1"]
    assert engine_steps.main([*command, "--precision", "fp32", "--attention", "torch"]) == 2
    assert "engine 'colossalai'" in capsys.readouterr().err


@pytest.mark.gpu
@installed
def test_on_a_gpu_both_engines_train_alike(tmp_path: Path) -> None:
    command = ["--out", str(tmp_path), "--model", "dit-s-2", "--seq-len", "1024", "--steps", "5", "--rounds", "2"]
    assert engine_steps.main(command) == 0
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2
