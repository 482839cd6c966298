"""longreel.bench.emulation_check: the two worlds of one, and what it says where they differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from longreel.bench import emulation_check
from longreel.bench.emulation_check import CheckConfig, World, check, differences

SMALL = {"model": "dit-s-4", "depth": 1, "seq_len": 64, "precision": "fp32", "rounds": 2, "steps": 1}


@pytest.mark.slow
def test_worlds_of_one_are_equal_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    one_rank = emulation_check._one_rank

    def noting(kind: str, *args: Any) -> Any:
        order.append(kind)
        return one_rank(kind, *args)

    monkeypatch.setattr(emulation_check, "_one_rank", noting)
    real, emulated = check(CheckConfig(**SMALL))
    assert order == ["real", "emulated", "emulated", "real"]
    assert differences(real, emulated) == []
    assert len(real.gradients) > 10 and real.loss > 0
    assert (len(real.samples_s), len(emulated.samples_s)) == (2, 2)
    assert not dist.is_initialized()


def test_differences_are_named() -> None:
    one = World(loss=1.0, gradients={"a": torch.zeros(2), "b": torch.zeros(2)})
    other = World(loss=1.5, gradients={"a": torch.tensor([0.0, 1e-30]), "c": torch.zeros(2)})
    assert differences(one, other) == [
        "loss: 1.0 and 1.5",
        "only one world has a gradient of b",
        "only one world has a gradient of c",
        "gradient of a",
    ]


@pytest.mark.parametrize(("fields", "match"), [({"steps": 0}, "steps must be"), ({"target": "x"}, "unknown GPU")])
def test_bad_input_is_one_line(fields: dict[str, Any], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=match):
        CheckConfig(**fields)
    assert emulation_check.main(["--steps", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.gpu
def test_on_a_gpu_the_worlds_are_equal_and_need_the_same_memory() -> None:
    real, emulated = check(CheckConfig(depth=1, seq_len=4096, rounds=1, steps=1))
    assert differences(real, emulated) == []
    assert real.memory is not None and emulated.memory is not None
    assert abs(emulated.memory / real.memory - 1) < 0.01
