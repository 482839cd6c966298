"""data/prepare.py: the same bytes however it runs, resumed after a kill, with everything left out named."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longreel.data.cutting import CutConfig
from longreel.data.prepare_config import PrepareConfig, plan_groups
from longreel.data.prepare_group import Done, GroupWorker
from longreel.data.prepare_run import prepare
from longreel.data.shards import ShardDataset
from longreel.data.sources import SourceVideo
from longreel.models.publish import published

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "prepare.py"
CODECS = ("libx264", "libx265", "libsvtav1", "libvpx-vp9")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def videos(encode: Callable[..., Path]) -> Path:
    """Six videos of four codecs and several sizes; captions in CSV, two of one video."""
    generator = np.random.default_rng(0)
    lines = ["path,text"]
    for number, (codec, size) in enumerate(
        zip((*CODECS, "libx264", "libx264"), ((64, 80), (64, 64), (66, 90), (72, 64), (48, 96), (64, 64)), strict=True)
    ):
        small = generator.integers(16, 235, (12, *(-(-side // 16) for side in size)), np.uint8)
        levels = small.repeat(16, 1).repeat(16, 2)[:, : size[0], : size[1]]
        path = encode(f"{number}.mkv", levels, codec=codec)
        lines.append(f'{number}.mkv,"video {number}, and more"')
    lines.append("3.mkv,another")
    folder = path.parent / "videos"
    folder.mkdir()
    for file in path.parent.glob("*.mkv"):
        file.rename(folder / file.name)
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


def config(videos: Path, out: str, **options: object) -> PrepareConfig:
    fields = {"cut": CutConfig(clip_frames=8), "processes": 1} | options
    return PrepareConfig(videos=videos, captions=videos / "captions.csv", out=videos.parent / out, **fields)


def test_every_codec_becomes_clips_and_a_summary(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(config(videos, "out"))
    folder = videos.parent / "out"
    clips = ShardDataset(folder)
    assert len(clips) == 12
    assert sorted(set(clips.sizes)) == sorted(
        {(t, h, w) for t in (8, 4) for h, w in ((64, 80), (64, 64), (66, 90), (72, 64), (48, 96))}
    )
    assert [clip.captions for clip in clips if clip.source == "3.mkv"] == [("video 3, and more", "another")] * 2
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["videos"], summary["clips"], summary["frames"]) == (6, 12, 72)
    assert not any(summary["left_out"].values())
    assert "12 clips of 6 of 6 captioned videos, 72 frames" in capsys.readouterr().err
    with Image.open(folder / "contact_sheet.png") as sheet:
        sheet.load()
        assert sheet.size == (4 * 198 + 6, 3 * 180 + 6)
        # The tile of the first clip holds its picture, not paper.
        assert np.asarray(sheet)[20:130, 20:180].std() > 10
    assert not list(folder.rglob("*.partial"))


def test_the_same_bytes_from_several_processes_and_ranks(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(config(videos, "one"))
    prepare(config(videos, "two", processes=2))
    for rank in (1, 0, 2):
        assert not (videos.parent / "ranks" / "index.parquet").is_file()
        prepare(config(videos, "ranks", rank=rank, world=3))
    assert "groups are left to other ranks" in capsys.readouterr().err
    one = files_of(videos.parent / "one")
    assert len([name for name in one if name.startswith("shards/")]) == 6
    assert files_of(videos.parent / "two") == one
    assert files_of(videos.parent / "ranks") == one


def test_killed_and_run_again_gives_the_same_bytes(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(config(videos, "whole"))
    arguments = [videos, videos / "captions.csv", videos.parent / "killed", "--clip-frames", "8", "--processes", "2"]
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    parts = videos.parent / "killed" / "parts"
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(parts.glob("*.parquet")) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    running.kill()
    running.wait()
    # The pool's processes see that their parent is gone.
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert done
    with suppress(KeyboardInterrupt), published(parts.parent / "shards" / "00005-00.safetensors") as partial:
        raise KeyboardInterrupt
    partial.parent.mkdir()
    partial.write_bytes(b"half")
    (partial.parent / ".tmpAbCdEf").write_bytes(b"what safetensors writes to")
    (parts.parent / ".dataset.json.host-1-ab.partial").mkdir()
    capsys.readouterr()
    # As the same command would: how many processes there are changes no byte, and their imports take seconds.
    prepare(config(videos, "killed"))
    assert f"{len(done)} groups were done before" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert {name: after[name] for name in done} == done
    assert files_of(videos.parent / "killed") == files_of(videos.parent / "whole")


def test_a_lost_shard_is_made_again(videos: Path) -> None:
    prepare(config(videos, "out"))
    before = files_of(videos.parent / "out")
    (videos.parent / "out" / "shards" / "00002-00.safetensors").unlink()
    prepare(config(videos, "out"))
    assert files_of(videos.parent / "out") == before


def test_what_a_crash_left_cut_off_is_made_again(videos: Path) -> None:
    prepare(config(videos, "out"))
    out = videos.parent / "out"
    before = files_of(out)
    (out / "parts" / "00001.parquet").write_bytes(b"")
    for path in (out / "parts" / "00003.parquet", out / "shards" / "00004-00.safetensors"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    prepare(config(videos, "out"))
    assert files_of(out) == before


def test_bytes_are_on_the_disk_before_their_name_is(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real_sync, real_replace = set[int](), os.fsync, os.replace

    def sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        assert source.stat().st_ino in synced, target
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    prepare(config(videos, "out"))
    assert {(videos.parent / "out" / name).stat().st_ino for name in ("shards", "parts")} <= synced


def test_another_preparation_is_not_mixed_in(videos: Path) -> None:
    prepare(config(videos, "out"))
    with pytest.raises(ValueError, match="holds another preparation, with other cut; give another folder"):
        prepare(config(videos, "out", cut=CutConfig(clip_frames=4)))
    (videos / "captions.csv").write_text("path,text\n1.mkv,new\n")
    with pytest.raises(ValueError, match="with other videos or captions"):
        prepare(config(videos, "out"))


def test_a_killed_process_of_the_pool_is_an_error_and_not_a_wait(videos: Path) -> None:
    arguments = [videos, videos / "captions.csv", videos.parent / "out", "--clip-frames", "8", "--processes", "2"]
    running = subprocess.Popen([sys.executable, str(SCRIPT), *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    deadline = time.monotonic() + 120
    workers: list[str] = []
    while len(workers) < 2 and running.poll() is None and time.monotonic() < deadline:
        # The first child is multiprocessing's resource tracker.
        workers = children.read_text().split()
        time.sleep(0.005)
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 2
    assert "error: a process ended before its work was done" in errors
    assert "run the same command again to go on" in errors


def test_a_long_video_is_shared_by_several_groups() -> None:
    long, short = SourceVideo(file="a", captions=("x",), size=1 << 30), SourceVideo(file="b", captions=("x",), size=10)
    groups = plan_groups([long, short], CutConfig())
    assert len(groups) == 17
    assert [piece.number for group in groups[:-1] for piece in group] == list(range(16))
    assert len(plan_groups([long, short], CutConfig(clip_frames=None))) == 2
    assert len(plan_groups([long, short], CutConfig(scene_threshold=20.0))) == 2
    assert plan_groups([], CutConfig()) == []


def command_after(first: str, arguments: list[object]) -> list[str]:
    """data/prepare.py after some Python."""
    program = f"{first}; import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return [sys.executable, "-c", program, str(SCRIPT), *map(str, arguments)]


def is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_disk_that_is_full_is_one_line_and_nothing_is_lost(videos: Path, processes: str) -> None:
    arguments = [videos, videos / "captions.csv", videos.parent / "out", "--processes", processes]
    # No file may be longer: as a disk that is full, but for the words.
    command = command_after("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))", arguments)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert re.match(
        rf"error: {videos.parent}/out/shards/\d+-00\.safetensors: cannot be written: .*File too large", line
    )
    assert "Traceback" not in done.stderr
    prepare(config(videos, "out", cut=CutConfig()))
    prepare(config(videos, "whole", cut=CutConfig()))
    assert files_of(videos.parent / "out") == files_of(videos.parent / "whole")


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_ctrl_c_is_one_line_and_leaves_no_process(videos: Path) -> None:
    arguments = [videos, videos / "captions.csv", videos.parent / "out", "--clip-frames", "2", "--processes", "2"]
    # Where the tests run in the background, it is ignored.
    command = command_after("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)", arguments)
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert running.stderr is not None
    assert "captioned videos" in running.stderr.readline()
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    # multiprocessing's tracker, and two that begin to import.
    while len(children.read_text().split()) < 3:
        time.sleep(0.002)
    time.sleep(0.2)
    # To all of them, as a terminal sends it.
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (130, "interrupted\n")
    # The tracker ends by itself, once all others have.
    deadline = time.monotonic() + 30
    while is_there(running.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_there(running.pid)


def test_the_largest_groups_come_first(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, run = list[int](), GroupWorker.run

    def noted(self: GroupWorker, index: int) -> Done:
        sizes.append(sum(self.job.videos[piece.video].size for piece in self.job.groups[index]))
        return run(self, index)

    monkeypatch.setattr(GroupWorker, "run", noted)
    prepare(config(videos, "out"))
    assert len(sizes) > 3
    assert sizes == sorted(sizes, reverse=True)


def test_pieces_give_the_clips_of_the_whole(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"cut": CutConfig(clip_frames=2)}
    prepare(config(videos, "whole", **options))
    monkeypatch.setattr("longreel.data.prepare_config._PIECE_BYTES", 1000)
    prepare(config(videos, "pieces", **options))
    whole, pieces = (ShardDataset(videos.parent / name) for name in ("whole", "pieces"))
    assert len(list((videos.parent / "pieces" / "parts").iterdir())) > 6
    assert whole.digest == pieces.digest


def test_large_groups_are_split_into_shards(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longreel.data.prepare_config._GROUPS", 1)
    config_of = config(videos, "out", shard_mib=1, cut=CutConfig(clip_frames=12))
    for number in range(6):
        shutil.copy(videos / f"{number}.mkv", videos / f"again{number}.mkv")
    lines = [f"again{number}.mkv,x" for number in range(6)]
    (videos / "captions.csv").write_text((videos / "captions.csv").read_text() + "\n" + "\n".join(lines))
    prepare(config_of)
    shards = sorted((videos.parent / "out" / "shards").iterdir())
    assert [path.name for path in shards] == [f"00000-{number:02d}.safetensors" for number in range(len(shards))]
    assert len(shards) >= 2
    assert all(path.stat().st_size < (1 << 20) + 4096 for path in shards)
    ShardDataset(videos.parent / "out").check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "captions.csv", "out"], "videos: nowhere is not a folder"),
        (["videos", "nothing.csv", "out"], "[Errno 2] No such file or directory: 'nothing.csv'"),
        (["videos", "captions.csv"], ""),
        (["videos", "captions.csv", "out", "--processes", "0"], "processes must be at least 1, got 0"),
        (["videos", "captions.csv", "out", "--rank", "1"], "give rank and world together"),
        (["videos", "captions.csv", "out", "--rank", "2", "--world", "2"], "rank must be 0 to world - 1 = 1"),
        (
            ["videos", "captions.csv", "out", "--autoencoder", "vqvae"],
            "autoencoder 'vqvae' needs autoencoder_path",
        ),
    ],
)
def test_command_line_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from longreel.data.command_line import run_command

    monkeypatch.chdir(tmp_path)
    Path("videos").mkdir()
    Path("captions.csv").write_text("path,text\na.mp4,x\n")
    assert run_command(prepare, PrepareConfig, arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
