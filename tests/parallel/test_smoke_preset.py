"""The smoke preset: fp32, bf16 and fp16 converge alike, an overflow in fp16 costing its step and no more.

`pytest -m slow -s tests/parallel/test_smoke_preset.py`.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from longreel.data.command_line import parse_arguments
from longreel.parallel.launch import process_group
from longreel.parallel.presets import with_preset
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.trainer import Trainer

STEPS, WINDOW, LEFT_OUT = 120, 20, 30


def smoke_run(out: Path, precision: str) -> tuple[list[dict[str, Any]], str]:
    """Lines of metrics.jsonl and what was said. One step is left out: by an overflow in fp16, in others by hand."""
    words = ["--preset", "smoke", "--steps", str(STEPS), "--precision", precision, "--out", str(out)]
    config, said = parse_arguments(TrainConfig, with_preset(words)), io.StringIO()
    with process_group() as device:
        trainer = Trainer(config, device, console=Console(file=said, soft_wrap=True))
        engine = trainer.model.engine
        loss_of, step_of = trainer.model.loss, engine.step

        def loss(batch: Any) -> torch.Tensor:
            found = loss_of(batch)
            if precision == "fp16" and trainer.step + 1 == LEFT_OUT:
                found.register_hook(lambda gradient: gradient * float("inf"))
            return found

        def step() -> None:
            if precision != "fp16" and trainer.step + 1 == LEFT_OUT:
                trainer.state.optimizer.zero_grad()
            else:
                step_of()

        trainer.model.loss, engine.step = loss, step  # type: ignore[method-assign]
        trainer.train()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], said.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_precisions_converge_alike(tmp_path: Path) -> None:
    runs = {precision: smoke_run(tmp_path / precision, precision) for precision in ("fp32", "bf16", "fp16")}
    curves = {
        precision: torch.tensor([line["loss"] for line in lines], dtype=torch.float64)
        .unflatten(0, (-1, WINDOW))
        .mean(1)
        for precision, (lines, _) in runs.items()
    }
    for precision, curve in curves.items():
        print(precision, [round(loss, 4) for loss in curve.tolist()])
    assert curves["fp32"][-1] < curves["fp32"][0] / 3
    for precision in ("bf16", "fp16"):
        torch.testing.assert_close(curves[precision], curves["fp32"], rtol=0.03, atol=0)

    lines, said = runs["fp16"]
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [LEFT_OUT]
    assert [line["skipped_steps"] for line in lines] == [int(step >= LEFT_OUT) for step in range(1, STEPS + 1)]
    assert f"step {LEFT_OUT} left out: gradients overflowed; the loss is now scaled by 32768" in said
