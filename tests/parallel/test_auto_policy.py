"""parallel/train.py --policy auto: chosen before the ranks meet, said once, and written down with the run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from longreel.parallel.auto_policy import with_policy
from longreel.parallel.checkpoint import checkpoints, read_run
from longreel.parallel.config import ParallelConfig
from longreel.parallel.launch import run_script
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.predict.planner import plan
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.sample import sample
from longreel.parallel.sample_config import SampleConfig
from longreel.parallel.trainer import train

SIZES = {"depth": 1, "hidden-size": 32, "num-heads": 4, "num-frames": 4, "height": 16, "width": 16, "batch-size": 1}
TINY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
AUTO = ["--demo", *TINY, "--steps", "1", "--policy", "auto"]


def test_choice_is_said_once_and_written_into_metrics_and_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    args = [*AUTO, "--memory-limit-gib", "4", "--out", str(out)]
    assert run_script(train, TrainConfig, args, prepare=with_policy) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "policy" in line)
    assert line.startswith("policy none: fits 4 GiB per rank")
    (metrics,) = (json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines())
    assert metrics["policy"] == "none"
    _, run = read_run(checkpoints(out / "checkpoints")[-1])
    assert run["parallel"]["policy"] == "none"
    assert run["policy_reason"] == line.removeprefix("policy ")
    # A later run may choose anew.
    again = [*args[:-2], "--out", str(out), "--resume", "--steps", "2"]
    assert run_script(train, TrainConfig, again, prepare=with_policy) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param([], "no device memory to fit on a CPU; give memory_limit_gib", id="no-limit"),
        pytest.param(["--memory-limit-gib", "0.0001"], "none fits 0.0001 GiB per rank: none ", id="too-little"),
        pytest.param(["--memory-limit-gib", "-1"], "memory_limit_gib must be positive", id="negative"),
        pytest.param(
            ["--memory-limit-gib", "1", "--precision", "fp64"], "cannot foresee precision fp64", id="precision"
        ),
    ],
)
def test_what_cannot_be_chosen_is_one_line(capsys, tmp_path, args, message):
    status = run_script(train, TrainConfig, [*AUTO, *args, "--out", str(tmp_path / "run")], prepare=with_policy)
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert message in line
    assert not (tmp_path / "run").exists()


def test_offload_is_held_to_the_budget_that_chose_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    def run(**parallel: Any) -> TrainConfig:
        spread = ParallelConfig(
            strategy="ring", sp_degree=2, policy="auto", attention_provider="sdpa-flash", **parallel
        )
        model = ModelChoice(depth=8, hidden_size=128)
        return with_policy(
            TrainConfig(demo=True, num_frames=16, height=96, width=96, batch_size=1, model=model, parallel=spread)
        )

    with pytest.raises(ValueError, match="none fits") as error:
        run(memory_limit_gib=1e-3)
    need = float(str(error.value).partition("offload ")[2].split()[0])
    chosen = run(memory_limit_gib=need * 1.001, host_memory_gib=0.5).parallel
    assert (chosen.policy, chosen.host_memory_gib, chosen.memory_limit_gib) == ("offload", 0.5, None)
    # Without a budget it is a share of the node's.
    share = run(memory_limit_gib=need * 1.001).parallel.host_memory_gib
    assert share is not None
    assert share > 0.5


def test_only_training_takes_auto(capsys, tmp_path):
    kept = TrainConfig(demo=True)
    assert with_policy(kept) is kept
    with pytest.raises(ValueError, match="memory_limit_gib must be positive and goes with policy 'auto'"):
        ParallelConfig(policy="full", memory_limit_gib=1.0)
    out = tmp_path / "run"
    assert run_script(train, TrainConfig, [*AUTO[:-2], "--out", str(out)]) == 0
    capsys.readouterr()
    args = ["--checkpoint", str(out), "--prompt", "", "--policy", "auto", "--out", str(tmp_path / "x.mp4")]
    assert run_script(sample, SampleConfig, args) == 2
    assert "policy 'auto' is chosen before a training run" in capsys.readouterr().err


def test_plan_is_said_once_and_written_down(tmp_path, capsys):
    out = tmp_path / "run"
    args = [*AUTO[:-2], "--plan", "auto", "--target", "h800", "--precision", "bf16", "--out", str(out)]
    assert run_script(train, TrainConfig, args, prepare=with_policy) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "by the plan" in line)
    assert line.startswith("policy by the plan: local, ")
    assert "of 73.5 GiB per rank" in line
    assert "tokens/s predicted for H800" in line
    _, run = read_run(checkpoints(out / "checkpoints")[-1])
    assert run["policy_reason"] == line.removeprefix("policy ")
    assert run["parallel"]["policy"] in line


def test_plan_takes_the_ranks_there_are(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    asked = TrainConfig(
        demo=True,
        num_frames=16,
        height=64,
        width=64,
        batch_size=1,
        plan="auto",
        model=ModelChoice(depth=2, hidden_size=64),
        parallel=ParallelConfig(policy="auto", memory_limit_gib=1, precision="fp32"),
    )
    chosen = with_policy(asked)
    # One sample: all ranks share it. Without rates the least is recomputed.
    assert chosen.parallel.sp_degree == 4
    assert (chosen.parallel.policy, chosen.parallel.memory_limit_gib) == ("none", None)
    assert "least that is recomputed and moved" in (chosen.policy_reason or "")


def test_a_plan_for_a_gpu_is_one_for_its_kernels(monkeypatch):
    asked = TrainConfig(demo=True, batch_size=1, plan="auto", target="h800", model=ModelChoice(depth=1, hidden_size=64))
    settings = []

    def planned(setting, base):
        settings.append((setting.attention_provider, setting.fused_pointwise))
        return plan(setting, base)

    monkeypatch.setattr("longreel.parallel.auto_policy.plan", planned)
    with_policy(asked)
    with_policy(replace(asked, parallel=ParallelConfig(attention_provider="torch")))
    # Whatever attention this machine would take.
    assert settings == [("sdpa-flash", True), ("torch", True)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--plan", "auto"], "plan 'auto' has no device memory to fit on a CPU; give a GPU to plan for"),
        (["--plan", "auto", "--target", "rtx"], "unknown GPU 'rtx'"),
        (["--target", "h800"], "target 'h800' goes with plan 'auto'"),
        (
            ["--plan", "auto", "--target", "h800", "--sp-degree", "2", "--strategy", "ring"],
            "plan 'auto' chooses strategy",
        ),
        (
            ["--plan", "auto", "--target", "h800", "--policy", "full"],
            "plan 'auto' chooses policy; leave policy 'full' out",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, tmp_path, args, message):
    assert run_script(train, TrainConfig, [*AUTO[:-2], *args, "--out", str(tmp_path)], prepare=with_policy) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
