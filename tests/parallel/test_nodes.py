"""Several nodes, as two launchers on this machine: the same training, and an end for all when one rank dies."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longreel.data.command_line import parse_arguments
from longreel.data.demo import make_demo_folder
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.shared_folder import check_shared
from longreel.parallel.trainer import Trainer

SCRIPT = Path(__file__).resolve().parents[2] / "parallel" / "train.py"
SIZES = {"depth": 1, "hidden-size": 32, "num-heads": 4, "num-frames": 4, "height": 16, "width": 16, "batch-size": 2}
TINY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    make_demo_folder(folder, num_frames=8, size=16)
    return folder


def launch(folder: Path, num_nodes: int, ranks: int, *words: str, timeout: float = 120.0) -> list[tuple[int, str]]:
    """Exit status and all output of each of num_nodes launchers with `ranks` ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(num_nodes), *rendezvous]
    launchers = []
    for node in range(num_nodes):
        # The first one holds the rendezvous; which ranks are whose is settled there.
        host = ["--rdzv-conf", f"is_host={str(node == 0).lower()}"]
        command = [*torchrun, *host, "--nproc-per-node", str(ranks), *words]
        with (folder / f"node-{node}.log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TEST_NODE": str(node)}
            launchers.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log))
    deadline = time.monotonic() + timeout
    try:
        for launcher in launchers:
            launcher.wait(timeout=max(0.0, deadline - time.monotonic()))
    finally:
        for launcher in launchers:
            launcher.terminate()
            launcher.wait()
    logs = [(folder / f"node-{node}.log").read_text() for node in range(num_nodes)]
    return [(launcher.returncode, log) for launcher, log in zip(launchers, logs, strict=True)]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_here(words: list[str]) -> None:
    torch.set_num_threads(1)
    Trainer(parse_arguments(TrainConfig, words), torch.device("cpu")).train()


@pytest.mark.slow
def test_two_nodes_train_as_one(run_distributed, tmp_path: Path, videos: Path) -> None:
    spread = ["--strategy", "usp", "--sp-degree", "4", "--ulysses-degree", "2", "--precision", "fp64", "--steps", "3"]
    words = ["--videos", str(videos), *spread, *TINY, "--out"]
    for status, log in launch(tmp_path, 2, 2, str(SCRIPT), *words, "two", "--sp-across-nodes"):
        assert status == 0, log
    run_distributed(train_here, 4, [*words, str(tmp_path / "one")])
    assert len(losses(tmp_path / "one")) == 3
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-12)


@pytest.mark.slow
def test_a_sequence_across_nodes_is_an_error_said_once(tmp_path: Path, videos: Path) -> None:
    command = [str(SCRIPT), "--videos", str(videos), "--strategy", "ring", "--sp-degree", "4", *TINY]
    ends = launch(tmp_path, 2, 2, *command)
    assert all(status != 0 for status, _ in ends)
    told = "".join(log for _, log in ends)
    assert told.count("error: sp_degree 4 puts ranks of different nodes into one sequence-parallel group") == 1
    assert "degrees that stay inside a node: 1, 2" in told


def refused(videos: str, out: str, *, node_folders: bool, sp_degree: int, checkpoint_on: int | None) -> str:
    """The error of a Trainer on two ranks of each of two nodes, whose `out` lies on the node where node_folders."""
    torch.set_num_threads(1)
    node = dist.get_rank() // 2
    folder = Path(out) / str(node) if node_folders else Path(out)
    if checkpoint_on is not None and dist.get_rank() == checkpoint_on:
        (folder / "checkpoints" / "step-000002").mkdir(parents=True)
    dist.barrier()
    config = TrainConfig(
        videos=Path(videos),
        out=folder,
        num_frames=4,
        height=16,
        width=16,
        model=ModelChoice(depth=1, hidden_size=32),
        parallel=ParallelConfig(strategy="ring", sp_degree=sp_degree),
    )
    os.environ["GROUP_RANK"] = str(node)
    try:
        Trainer(config, torch.device("cpu"))
    except ValueError as error:
        return str(error).replace(out, "OUT")
    finally:
        del os.environ["GROUP_RANK"]
    return ""


def crossing(videos: str, out: str) -> str:
    return refused(videos, out, node_folders=False, sp_degree=4, checkpoint_on=None)


def new_run_on_own_folders(videos: str, out: str) -> str:
    return refused(videos, out, node_folders=True, sp_degree=2, checkpoint_on=None)


def earlier_run_on_own_folders(videos: str, out: str) -> str:
    return refused(videos, out, node_folders=True, sp_degree=2, checkpoint_on=0)


def shared_out(videos: str, out: str) -> str:
    return refused(videos, out, node_folders=False, sp_degree=2, checkpoint_on=None)


@pytest.mark.parametrize(
    ("fn", "told"),
    [
        pytest.param(crossing, "sp_degree 4 puts ranks of different nodes", id="crossing"),
        pytest.param(
            new_run_on_own_folders,
            "is not one folder for all ranks: ranks 2, 3 do not see what rank 0 writes; put it on a file system that",
            id="new-run",
        ),
        pytest.param(
            earlier_run_on_own_folders,
            "steps of checkpoints differ between the 4 ranks of a group, which must hold the same: ranks 0, 1: [2]; "
            "ranks 2, 3: []",
            id="earlier-run",
        ),
        pytest.param(shared_out, "", id="shared"),
    ],
)
def test_what_nodes_must_share_is_looked_at(run_distributed, tmp_path, videos, fn, told):
    messages = run_distributed(fn, 4, str(videos), str(tmp_path / "out"))
    assert all(told in message if told else not message for message in messages), messages
    assert not list(tmp_path.rglob(".shared-*"))


def shared(folder: str) -> None:
    check_shared(Path(folder), build_mesh(sp_degree=1))


def test_a_shared_folder_is_left_as_it_was(run_distributed, tmp_path):
    run_distributed(shared, 2, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# What every rank runs: a training in which one rank, of the node without the rendezvous, ends inside the third step.
DYING = """
import os, signal, sys, time
import torch.distributed as dist
from longreel.parallel import launch
from longreel.parallel.launch import run_script
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.parallelize import ParallelDiT
from longreel.parallel.trainer import train

launch.LOST_SECONDS = 5.0
how, loss, calls = sys.argv.pop(1), ParallelDiT.loss, []

def dying(self, batch):
    calls.append(batch)
    if len(calls) == 3 and os.environ["TEST_NODE"] == "1" and os.environ["LOCAL_RANK"] == "1":
        print(f"rank {dist.get_rank()} died at {time.time()}", flush=True)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("what nobody else misses")
    return loss(self, batch)

ParallelDiT.loss = dying
sys.exit(run_script(train, TrainConfig, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("how", "told"),
    [
        pytest.param(
            "kill", r"error: gone, without a sign of life for 5 s: (rank \d of .*, )?rank {} of 4 \(host", id="kill"
        ),
        pytest.param(
            "raise",
            r"error: rank {} of 4 \(host \S+, pid \d+\) failed: KeyError: 'what nobody",
            id="raise",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_which_name_it(tmp_path: Path, videos: Path, how: str, told: str) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    spread = ["--strategy", "ring", "--sp-degree", "2", "--steps", "9", "--timeout-s", "60"]
    ends = launch(tmp_path, 2, 2, "dying.py", how, "--videos", str(videos), *spread, *TINY)
    assert all(status != 0 for status, _ in ends)
    died = re.search(r"rank (\d) died at (\S+)", ends[1][1])
    assert died is not None, ends
    rank, moment = died[1], float(died[2])
    # The launcher of its node names it and ends the rank beside it.
    assert re.search(rf"rank +: {rank} \(local_rank: 1\)", ends[1][1])
    # The ranks of the other node name it, within 5 s, 3 s to be sure, and 5 s in which they may end by themselves.
    assert re.search(told.format(rank), ends[0][1]), ends[0][1]
    assert (tmp_path / "node-0.log").stat().st_mtime - moment < 20
