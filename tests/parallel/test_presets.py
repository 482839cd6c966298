"""parallel/presets.py: every preset is a command line that works, what follows it wins, and the largest one fits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from longreel.data.command_line import parse_arguments
from longreel.models.dit import parameter_count
from longreel.parallel.auto_policy import with_policy
from longreel.parallel.config import CHOSEN_BY_PLAN, ParallelConfig
from longreel.parallel.predict.predict import PredictionCase, predict_step
from longreel.parallel.presets import PRESETS, with_preset
from longreel.parallel.run_config import TrainConfig


def parsed(*words: str) -> TrainConfig:
    return parse_arguments(TrainConfig, with_preset(words))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_run(name: str) -> None:
    config = parsed("--preset", name, *([] if name == "smoke" else ["--shards", "x"]))
    assert config.preset == name
    assert config.optimizer.schedule == "cosine"
    assert config.demo == (name == "smoke")


def test_words_after_a_preset_win() -> None:
    config = parsed("--preset=smoke", "--steps", "7", "--patch-size", "1", "4", "4")
    assert (config.steps, config.model.patch_size, config.objective.prediction) == (7, (1, 4, 4), "x0")
    assert not parsed("--preset", "smoke", "--videos", "x").demo
    assert parsed("--demo").objective.prediction == "x0"
    assert parsed("--videos", "x") == TrainConfig(videos=Path("x"))
    with pytest.raises(ValueError, match="unknown preset 'huge'; presets are smoke, small, xl2-131k, xl2-819k"):
        parsed("--preset", "huge")


@pytest.mark.parametrize("plan", [("--plan", "auto"), ("--plan=auto",)], ids=["two-words", "one"])
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "smoke"])
def test_a_plan_takes_the_place_of_a_presets_own_choices(name: str, plan: tuple[str, ...]) -> None:
    words = ("--preset", name, "--shards", "nowhere")
    config, without = parsed(*words, *plan), parsed(*words)
    for choice in CHOSEN_BY_PLAN:
        assert getattr(config.parallel, choice) == getattr(ParallelConfig(), choice)
    rest = replace(config.parallel, **{choice: getattr(without.parallel, choice) for choice in CHOSEN_BY_PLAN})
    assert replace(config, plan=None, parallel=rest) == without
    with pytest.raises(ValueError, match="nowhere"):
        with_policy(parsed(*words, *plan, "--target", "h800"))
    # What the command line itself says beside a plan is still refused.
    with pytest.raises(ValueError, match="plan 'auto' chooses engine; leave engine 'ddp' out, or the plan"):
        with_policy(parsed(*words, *plan, "--engine", "ddp", "--precision", "fp32"))
    assert parsed(*words, *plan, "--plan", "None") == without


@pytest.mark.parametrize(("name", "tokens"), [("xl2-131k", 131_072), ("xl2-819k", 819_200)])
def test_sequences_of_a_preset_fit_80_gb_by_prediction(name: str, tokens: int) -> None:
    config = parsed("--preset", name, "--shards", "x")
    assert config.token_budget == tokens
    model = config.model.build(in_channels=4, raw=False, text_dim=4096, max_text_tokens=120)
    case = PredictionCase(model=model, parallel=config.parallel, num_gpus=8, target="h100", seq_len=tokens)
    assert config.batch_size % config.parallel.dp_degree(8) == 0
    found = predict_step(case)
    # The average of the weights is a shard more, which the prediction does not know.
    average = 4 * parameter_count(model) // 8
    print(f"{name}: {(found.memory_bytes + average) / 2**30:.1f} GiB of {found.usable_bytes / 2**30:.1f}")
    assert found.memory_bytes + average <= found.usable_bytes


def test_a_demo_of_ddpm_is_told_what_of_its_preset_to_undo(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--demo", "--objective", "ddpm"]
    with pytest.raises((ValueError, SystemExit)) as refused:
        parsed(*words)
    told = str(refused.value) + capsys.readouterr().err
    assert "and --demo and presets set some" in told
    advice = re.search(r"give (--prediction .*) with it", told)
    assert advice is not None
    assert parsed(*words, *advice[1].split()).objective.objective == "ddpm"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shards", "x", "--height", "999"], "height 999 has no effect with shards"),
        (["--shards", "x", "--num-frames", "9"], "num_frames 9 has no effect with shards"),
        (["--shards", "x", "--frame-stride", "2"], "frame_stride 2 has no effect with shards"),
        (["--videos", "x", "--native-sizes", "--width", "48"], "width 48 has no effect with native_sizes"),
    ],
)
def test_sizes_that_clips_of_their_own_sizes_would_not_read_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(*words, "--token-budget", "64")


def test_clips_of_their_own_sizes_take_what_they_read() -> None:
    assert parsed("--preset", "smoke", "--shards", "x", "--token-budget", "64").shards == Path("x")
    native = ["--videos", "x", "--native-sizes", "--token-budget", "64"]
    assert parsed(*native, "--num-frames", "4", "--frame-stride", "2").frame_stride == 2
