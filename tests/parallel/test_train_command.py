"""parallel/train.py and parallel/sample.py from the outside: they run, and what is wrong is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest

from longreel.data.demo import make_demo_folder
from longreel.parallel.launch import run_script
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.sample import sample
from longreel.parallel.sample_config import SampleConfig
from longreel.parallel.trainer import train

SCRIPTS = Path(__file__).resolve().parents[2] / "parallel"
SIZES = {"depth": 1, "hidden-size": 32, "num-heads": 4, "num-frames": 4, "height": 16, "width": 16, "batch-size": 2}
TINY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    make_demo_folder(folder, num_frames=8, size=16)
    return folder


def fails(capsys: pytest.CaptureFixture[str], script: str, *args: str) -> str:
    """The one line that a command which cannot work prints."""
    work, config = (train, TrainConfig) if script == "train" else (sample, SampleConfig)
    status = run_script(work, config, args)  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param([], "one of shards (--shards) or --demo; none was given", id="no-source"),
        pytest.param(["--demo", "--videos", "x"], "or --demo, not videos and demo", id="two-sources"),
        pytest.param(
            ["--demo", "--captions", "x"],
            "--demo has its own captions; give --captions only with --videos",
            id="demo-captions",
        ),
        pytest.param(
            ["--demo", "--strategy", "rings"],
            "Expected one of ('local', 'ulysses', 'fastseq', 'ring', 'usp')",
            id="strategy",
        ),
        pytest.param(["--demo", "--dit", "dit-xxl"], "presets are dit-s-2, dit-s-4", id="dit"),
        pytest.param(["--demo", "--strategy", "local", "--sp-degree", "2"], "does not split the sequence", id="local"),
        pytest.param(["--demo", "--stepps", "3"], "--stepps", id="unknown-flag"),
        pytest.param(
            ["--demo", "--steps", "many"], "invalid literal for int() with base 10: 'many'", id="not-a-number"
        ),
        pytest.param(["--demo", "--steps", "0"], "steps must be at least 1, got 0", id="steps"),
        pytest.param(
            ["--demo", "--height", "33"], "height = 33 is not a positive multiple of the patch size 4", id="size"
        ),
        pytest.param(["--demo", "--caption-dropout", "2"], "caption_dropout must be in [0, 1]", id="dropout"),
        pytest.param(["--demo", "--learning-rate", "nan"], "learning_rate must be positive", id="nan"),
        pytest.param(
            ["--demo", "--strategy", "ulysses", "--sp-degree", "3"],
            "num_heads 4 does not divide by sp_degree 3; degrees that work: 1, 2, 4; strategy ring takes any",
            id="heads",
        ),
        pytest.param(
            ["--demo", "--strategy", "ulysses", "--sp-degree", "2"],
            "sp_degree 2 does not divide the world size 1",
            id="world-size",
        ),
        pytest.param(["--demo", "--learning-rate", "inf"], "learning_rate must be positive and finite", id="inf"),
        pytest.param(["--demo", "--text-dim", "127"], "text_dim must be even and at least 2, got 127", id="text-dim"),
        pytest.param(["--demo", "--height", "9" * 24], "height must be below 2**31, got 999", id="height-24-digits"),
        pytest.param(
            ["--demo", "--max-text-tokens", "2"], "max_tokens must be at least 3 (BOS, one byte, EOS)", id="text"
        ),
        pytest.param(
            ["--demo", "--num-frames", "64"], "spans 64 frames; the clips of --demo have 32", id="demo-frames"
        ),
        pytest.param(
            ["--demo", "--num-frames", "12", "--frame-stride", "3"],
            "num_frames 12 at frame_stride 3 spans 34 frames; the clips of --demo have 32",
            id="demo-stride",
        ),
        pytest.param(
            ["--demo", "--seed", "999999999999999999999999"], "seed must be between 0 and 2**63 - 1, got 999", id="seed"
        ),
        pytest.param(
            ["--demo", "--attention-provider", "nope"], "unknown attention provider 'nope'", id="attention-provider"
        ),
        pytest.param(
            ["--demo", "--text-only", "--conditioning", "adaln"], "text_only leaves only the text attention", id="only"
        ),
        pytest.param(
            ["--demo", "--cross-layout", "published", "--conditioning", "adaln"],
            "cross_layout 'published' splits the cross attention",
            id="cross-layout",
        ),
        pytest.param(["--demo", "--timeout-s", "0"], "timeout_s must be between 1 and 31536000 seconds", id="timeout"),
        pytest.param(
            ["--demo", "--steps", "9", "--profile", "x", "--profile-steps", "8", "10"],
            "profile_steps must be a first and a last step within 1 to 9 (steps), got 8 10",
            id="profile-steps",
        ),
        pytest.param(["--videos", "nowhere"], "videos: nowhere is not a folder", id="no-folder"),
        pytest.param(["--demo", "--resume"], "no checkpoint to resume from", id="nothing-to-resume"),
    ],
)
def test_bad_command_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert message in fails(capsys, "train", *args, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_bad_data_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "videos", str(tmp_path / "out")
    folder.mkdir()
    assert "captions.json" in fails(capsys, "train", "--videos", str(folder), "--out", out)
    captions = folder / "captions.json"
    captions.write_text('[{"file": "a.mp4",\n "captions": "]')
    assert f"{captions}:2:14: not valid JSON" in fails(capsys, "train", "--videos", str(folder), "--out", out)
    captions.write_text(json.dumps([{"file": "a.mp4", "captions": ["x"]}, {"file": "b.mp4", "captions": ["x"]}]))
    (folder / "b.mp4").write_text("not a video")
    line = fails(capsys, "train", "--videos", str(folder), "--out", out)
    assert "none of 2 videos gives clips of 8 frames; the first: a.mp4: no such file" in line
    assert not (tmp_path / "out").exists()


def test_output_folder_that_cannot_be_written(tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    line = fails(capsys, "train", "--videos", str(videos), "--out", out, *TINY)
    assert f"{out}: cannot be written: Not a directory" in line
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    line = fails(capsys, "train", "--videos", str(videos), "--out", str(tmp_path / "run"), *TINY)
    assert "run/checkpoints: cannot be written: File exists" in line
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_unusable_videos_are_named_and_counted(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = json.loads((videos / "captions.json").read_text())
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps([*entries, {"file": "gone.mp4", "captions": ["x"]}]))
    args = ["--videos", str(videos), "--captions", str(captions), "--out", str(tmp_path / "out"), "--steps", "1", *TINY]
    assert run_script(train, TrainConfig, args) == 0
    err = capsys.readouterr().err
    assert "skipped 1 of 5 videos:\n  gone.mp4: no such file\n8 clips" in err


def test_runs_do_not_overwrite_each_other(tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--videos", str(videos), "--out", str(tmp_path / "out"), *TINY]
    assert run_script(train, TrainConfig, [*command, "--steps", "2"]) == 0
    capsys.readouterr()
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    assert "holds a run already (step-000002); use --resume" in fails(capsys, "train", *command)
    assert "cannot resume with another seed" in fails(capsys, "train", *command, "--resume", "--seed", "5")
    assert "cannot resume with another precision" in fails(capsys, "train", *command, "--resume", "--precision", "fp64")
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps(json.loads((videos / "captions.json").read_text())[:-1]))
    other = fails(capsys, "train", *command, "--captions", str(captions), "--resume", "--steps", "3")
    assert "cannot resume with other videos or captions" in other
    assert "has 2 steps already, and steps is 1" in fails(capsys, "train", *command, "--resume", "--steps", "1")
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before
    for flags, message in (
        (["--checkpoint", str(tmp_path / "nowhere")], "no checkpoint there"),
        (["--out", "clip.gif"], "out must be an .mp4 file, got clip.gif"),
        (["--out", str(tmp_path / "out" / "metrics.jsonl" / "clip.mp4")], "cannot be written"),
        (["--num-frames", "3"], "num_frames = 3 is not a positive multiple of the patch size 2"),
        (["--strategy", "fastseq", "--sp-degree", "3"], "sp_degree 3 does not divide the world size 1"),
        (["--sampler", "ddim"], "sampler 'ddim' does not go with this objective; those that do: euler"),
        (["--weights", "ema"], "holds no moving average of weights; use --weights model"),
        (["--guidance", "0"], "guidance must be positive"),
        (["--prompt", "caf\udce9"], r"prompt must be UTF-8 text, got 'caf\udce9'"),
        (["--fps", "inf"], "fps must be between 0.1 and 1000, got inf"),
        (["--fps", "1e12"], "fps must be between 0.1 and 1000, got"),
        (["--fps", "1e-6"], "fps must be between 0.1 and 1000, got"),
        (["--attention-provider", "nope"], "unknown attention provider 'nope'"),
    ):
        base = {"--checkpoint": str(tmp_path / "out"), "--prompt": "x", "--out": str(tmp_path / "new" / "clip.mp4")}
        base |= dict(zip(flags[::2], flags[1::2], strict=True))
        line = fails(capsys, "sample", *[word for pair in base.items() for word in pair])
        assert message in line
    assert not (tmp_path / "new").exists()


def script(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_demo_to_mp4_by_the_scripts(tmp_path: Path) -> None:
    trained = script(tmp_path, str(SCRIPTS / "train.py"), "--demo", "--steps", "2", *TINY)
    assert trained.returncode == 0, trained.stderr
    assert "4 tokens each" in trained.stderr
    assert "Warning" not in trained.stderr
    prompt = ["--prompt", "a red square", "--steps", "2", "--out", "clips/red.mp4"]
    sampled = script(tmp_path, str(SCRIPTS / "sample.py"), "--checkpoint", "out/train", *prompt)
    assert sampled.returncode == 0, sampled.stderr
    with av.open(str(tmp_path / "clips" / "red.mp4")) as container:
        shapes = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)]
    assert shapes == [(16, 16, 3)] * 4


@pytest.mark.slow
def test_torchrun_trains_and_an_error_is_said_once(tmp_path: Path, videos: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPTS / "train.py")]
    command = [*torchrun, "--videos", str(videos), "--strategy", "fastseq", "--sp-degree", "2", "--steps", "2", *TINY]
    trained = script(tmp_path, *command, "--out", "run")
    assert trained.returncode == 0, trained.stderr
    assert "1 data-parallel x 2 sequence-parallel ranks" in trained.stderr
    assert trained.stderr.count("checkpoint: run/checkpoints/step-000002") == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    again = script(tmp_path, *command, "--out", "run")
    assert again.returncode != 0
    assert again.stderr.count("error: run: holds a run already") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [["--plan", "auto", "--target", "h800", "--precision", "bf16"], ["--policy", "auto", "--memory-limit-gib", "4"]],
    ids=["plan", "policy"],
)
def test_what_is_chosen_for_two_ranks_is_saved_and_goes_on(tmp_path: Path, videos: Path, choice: list[str]) -> None:
    """Choosing runs predictions in each rank's process, of which nothing may stay."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPTS / "train.py")]
    command = [*torchrun, "--videos", str(videos), *TINY, *choice, "--out", "run"]
    for steps, resume in (("2", []), ("4", ["--resume"])):
        trained = script(tmp_path, *command, "--steps", steps, *resume)
        assert trained.returncode == 0, trained.stderr
        assert f"checkpoint: run/checkpoints/step-00000{steps}" in trained.stderr
