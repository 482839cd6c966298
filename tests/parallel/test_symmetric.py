"""Exchange back end `symmetric`: the bits of `p2p` under every strategy that takes it, and what it needs to start.

Between CPU processes the transport is shared_slots.py; on GPUs it is symmetric memory (marker gpu).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import shared_slots
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longreel.models.config import DiTConfig
from longreel.models.sequence import AttentionShape, SequenceLengths
from longreel.parallel import peer_access, strategies, symmetric
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.peer_mailbox import NUM_SLOTS, Mailbox
from longreel.parallel.predict.predict import trace_shape
from longreel.parallel.strategies import build_strategy

HEADS, WIDTH = 8, 64
CASES = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name, options in (
        ("fastseq", {"fastseq_overlap": "projection"}),
        ("fastseq", {"fastseq_overlap": "attention"}),
        ("fastseq", {"policy": "keep_attention"}),
        ("ring", {}),
        ("usp", {"ulysses_degree": 2}),
    )
]


def built(name: str, options: dict[str, Any], exchange: str):
    """The strategy over all ranks; peer access is not asked for."""
    degree = dist.get_world_size()
    config = ParallelConfig(strategy=name, sp_degree=degree, attention_provider="torch", exchange=exchange, **options)
    with mock.patch.object(strategies, "require_peer_access"):
        return build_strategy(config, build_mesh(sp_degree=degree, ulysses_degree=config.ulysses_degree))


def step(sp, seed: int) -> list[Tensor]:
    """Output and gradients of one attention layer, this rank's part; lengths go up and down."""
    torch.manual_seed(seed)
    valid = sp.degree + 1 + 3 * (seed % 4)
    lengths = SequenceLengths(valid=valid, padded=-(-valid // sp.degree) * sp.degree)
    x = torch.randn(2, lengths.padded, WIDTH)
    qkv = nn.Linear(WIDTH, 3 * WIDTH)
    local = sp.shard(x, 1).detach().requires_grad_()
    out = sp.self_attention(local, qkv, num_heads=HEADS, lengths=lengths)
    out.backward(torch.randn_like(out))
    return [out.detach(), local.grad, qkv.weight.grad, qkv.bias.grad]


def differing_rounds(folder: Path, name: str, options: dict[str, Any], rounds: int) -> tuple[int, int]:
    """Rounds in which delayed exchanges through shared memory differ from `p2p`; transports that were opened."""
    p2p, shared = built(name, options, "p2p"), built(name, options, "symmetric")
    behaviour = shared_slots.Behaviour(shared_slots.random_delays(dist.get_rank(), 2e-3))
    real, differing = torch.empty_like, 0
    with shared_slots.shared_memory_groups(folder, behaviour):
        for seed in range(rounds):
            expected = step(p2p, seed)
            # What comm receives into holds NaN before.
            with mock.patch.object(torch, "empty_like", lambda x, **kw: real(x, **kw).fill_(float("nan"))):
                found = step(shared, seed)
            differing += not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return differing, len(behaviour.opened)


@pytest.mark.parametrize(
    ("size", "rounds"),
    [
        pytest.param(size, rounds, id=f"P{size}-{rounds}", marks=[pytest.mark.slow] if rounds == 100 else [])
        for size, rounds in ((2, 4), (4, 10), (8, 4), (2, 100), (4, 100), (8, 100))
    ],
)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_bits_are_those_of_p2p(run_distributed, tmp_path, name, options, rounds, size):
    if size == options.get("ulysses_degree"):
        pytest.skip("no ring: such a configuration is refused")
    for differing, opened in run_distributed(differing_rounds, size, tmp_path, name, options, rounds):
        assert differing == 0
        # A mailbox for chunks and one for shares of gradients; each has grown, and is kept from step to step.
        assert 4 <= opened <= 8


def bytes_moved(folder: Path, name: str, options: dict[str, Any]) -> tuple[int, int, Any]:
    """Bytes read from peers in forward and in backward, and the strategy's account of what it sends."""
    sp = built(name, options, "symmetric")
    tokens = 4 * sp.degree
    lengths = SequenceLengths(valid=tokens, padded=tokens)
    behaviour = shared_slots.Behaviour()
    x, qkv = torch.randn(1, 4, WIDTH, requires_grad=True), nn.Linear(WIDTH, 3 * WIDTH)
    with shared_slots.shared_memory_groups(folder, behaviour):
        out = sp.self_attention(x, qkv, num_heads=HEADS, lengths=lengths)
        forward = behaviour.bytes_read
        out.sum().backward()
    shape = AttentionShape(batch=1, seq_len=tokens, num_heads=HEADS, head_dim=WIDTH // HEADS, element_size=4)
    return forward, behaviour.bytes_read - forward, sp.traffic(shape)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_as_many_bytes_as_p2p(run_distributed, tmp_path, name, options):
    for forward, backward, traffic in run_distributed(bytes_moved, 4, tmp_path, name, options):
        for moved, told in ((forward, traffic.forward), (backward, traffic.backward)):
            # All-to-alls are the process group's.
            assert moved == sum(count for kind, count in told.items() if kind != "all_to_all") > 0, told


def graph_of_two_ranks(folder: Path) -> bool:
    sp = built("fastseq", {}, "symmetric")
    lengths = SequenceLengths(valid=8, padded=8)
    x, qkv = torch.randn(1, 4, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def attention(x: Tensor) -> Tensor:
        return sp.self_attention(x, qkv, num_heads=HEADS, lengths=lengths)

    with shared_slots.shared_memory_groups(folder, shared_slots.Behaviour()):
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        return torch.equal(compiled(x), attention(x))


def test_compiles_into_one_graph(run_distributed, tmp_path):
    assert run_distributed(graph_of_two_ranks, 2, tmp_path) == [True, True]


@pytest.mark.parametrize("name", ["fastseq", "ring"])
def test_a_prediction_is_that_of_p2p(name):
    model = DiTConfig(depth=1, hidden_size=64, num_heads=4, in_channels=4, patch_size=(1, 2, 2))
    p2p, symmetric_one = (
        trace_shape(
            model,
            ParallelConfig(
                strategy=name, sp_degree=4, exchange=exchange, precision="bf16", attention_provider="sdpa-flash"
            ),
            world_size=4,
            grid=(2, 4, 4),
            batch=1,
            fused=True,
        )
        for exchange in ("p2p", "symmetric")
    )
    assert p2p.sent() == symmetric_one.sent()
    assert any(kind.startswith("sequence.") and count for kind, count in p2p.sent().items())
    assert p2p == symmetric_one


def refusal_on_gloo() -> str:
    config = ParallelConfig(strategy="ring", sp_degree=2, exchange="symmetric")
    with pytest.raises(ValueError, match="exchange 'symmetric'") as caught:
        build_strategy(config, build_mesh(sp_degree=2))
    return str(caught.value)


def test_processes_on_cpus_are_refused_on_every_rank(run_distributed):
    wanted = "backend nccl, got 'gloo'" if torch.cuda.is_available() else "needs a CUDA device, and there is none"
    for message in run_distributed(refusal_on_gloo, 2):
        assert wanted in message
        assert "exchange 'p2p' works everywhere" in message


def refusal_of_one() -> str:
    group = dist.group.WORLD.group_name
    lacking = "exchange 'symmetric' needs more" if dist.get_rank() == 1 else None
    with (
        mock.patch.object(peer_access, "unmet_need", return_value=lacking),
        pytest.raises(ValueError, match="symmetric") as caught,
    ):
        peer_access.require_peer_access(group)
    return str(caught.value)


def test_one_rank_that_cannot_is_told_to_all(run_distributed):
    first, second, third = run_distributed(refusal_of_one, 3)
    assert second == "exchange 'symmetric' needs more"
    assert first == third
    assert "ranks [1]" in first


def trial(folder: Path, swapped: bool) -> str | None:
    read = shared_slots.SharedSlots.read

    def wrong_slot(self, owner: int, slot: int, out: Tensor) -> None:
        read(self, dist.get_rank() if swapped else owner, slot, out)

    with (
        shared_slots.shared_memory_groups(folder, shared_slots.Behaviour()),
        mock.patch.object(shared_slots.SharedSlots, "read", wrong_slot),
    ):
        return peer_access.failed_trial(dist.group.WORLD.group_name, torch.device("cpu"))


def test_a_trial_finds_out_what_is_wrong(run_distributed, tmp_path):
    assert run_distributed(trial, 3, tmp_path, False) == [None] * 3
    messages = run_distributed(trial, 3, tmp_path / "..", True)
    assert messages[1] is not None
    assert "brought [1, 1, 1] for [1, 0, 2]" in messages[1]


class FakeNvml:
    """Two connected devices on this node, without atomics between the first and a third."""

    NVML_P2P_CAPS_INDEX_READ, NVML_P2P_CAPS_INDEX_WRITE, NVML_P2P_CAPS_INDEX_ATOMICS = 0, 1, 3
    NVML_P2P_STATUS_OK = 0

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if not uuid.startswith("GPU-here"):
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetP2PStatus(self, one: str, other: str, index: int) -> int:
        return int("GPU-here-2" in (one, other) and index == self.NVML_P2P_CAPS_INDEX_ATOMICS)


@pytest.mark.parametrize(
    ("uuids", "problem"),
    [
        pytest.param(["GPU-here-0"], None, id="alone"),
        pytest.param(["GPU-here-0", "GPU-here-1"], None, id="connected"),
        pytest.param(["GPU-here-0", "GPU-here-0"], "a device per rank; rank 1 has that of rank 0", id="shared"),
        pytest.param(["GPU-here-0", "GPU-here-2"], "ranks 0 and 1 there is no atomics", id="no-atomics"),
        pytest.param(["GPU-here-0", "GPU-there-0"], "on one node", id="other-node"),
    ],
)
def test_devices_that_cannot_read_each_other_are_named(monkeypatch, uuids, problem):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml())
    found = peer_access.unreachable(uuids, 0)
    assert found is None if problem is None else found is not None and problem in found


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        pytest.param(SimpleNamespace(rendezvous=None, get_backend=None), "put_signal", id="methods"),
        pytest.param(None, "torch.distributed._symmetric_memory", id="module"),
    ],
)
def test_a_torch_without_the_api_is_named(monkeypatch, module, missing):
    monkeypatch.setitem(__import__("sys").modules, "torch.distributed._symmetric_memory", module)
    with pytest.raises(ValueError, match=missing) as caught:
        symmetric.load_api()
    assert torch.__version__ in str(caught.value)


def test_this_torch_has_the_api():
    api = symmetric.load_api()
    # As _SymmetricMemory tells them: PeerMemory passes arguments by place.
    memory = api._SymmetricMemory
    for method, arguments in {
        "get_buffer": ["rank", "sizes", "dtype", "storage_offset"],
        "put_signal": ["dst_rank", "channel", "timeout_ms"],
        "wait_signal": ["src_rank", "channel", "timeout_ms"],
        "empty_strided_p2p": ["size", "stride", "dtype", "device"],
    }.items():
        places = [getattr(memory, method).__doc__.index(f"{argument}:") for argument in arguments]
        assert places == sorted(places), method


class FakeHandle:
    """One rank's own symmetric memory, on the CPU."""

    rank = 0

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.up = buffer, set[tuple[int, int]]()

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int) -> Tensor:
        assert rank == 0
        assert dtype == torch.uint8
        return self.buffer[storage_offset : storage_offset + sizes[0]]

    def put_signal(self, peer: int, channel: int, timeout_ms: int) -> None:
        assert (peer, channel) not in self.up
        self.up.add((peer, channel))

    def wait_signal(self, peer: int, channel: int, timeout_ms: int) -> None:
        self.up.remove((peer, channel))


def round_trips(transport: symmetric.PeerMemory, device: str) -> None:
    """A rank reads what it published itself, in every dtype, twice per slot."""
    mailbox = Mailbox(lambda slot_bytes: transport)
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.float16):
        for seed in range(2 * NUM_SLOTS):
            x = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
            received = torch.full_like(x, float("nan"))
            mailbox.fetch(mailbox.publish(x, [0]), 0, received).wait()
            assert torch.equal(received, x)


def test_peer_memory_puts_slots_and_signals_where_the_protocol_says(monkeypatch):
    buffers = []

    def empty(size, stride, dtype, device) -> Tensor:
        buffers.append(torch.full(size, 255, dtype=dtype))
        return buffers[-1]

    api = SimpleNamespace(
        _SymmetricMemory=SimpleNamespace(empty_strided_p2p=empty),
        rendezvous=lambda buffer, group: FakeHandle(buffer),
    )
    monkeypatch.setattr(symmetric, "load_api", lambda: api)
    monkeypatch.setattr(torch.cuda, "Stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock())
    transport = symmetric.PeerMemory("group", torch.device("cpu"), 3 * 5 * 8)
    assert transport.slot_bytes == symmetric.ALIGNMENT
    round_trips(transport, "cpu")
    assert len(buffers) == 1
    assert buffers[0].numel() == NUM_SLOTS * symmetric.ALIGNMENT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"strategy": "ulysses", "sp_degree": 2}, "got strategy 'ulysses'", id="ulysses"),
        pytest.param({"strategy": "local"}, "got strategy 'local'", id="local"),
        pytest.param({"strategy": "usp", "sp_degree": 4, "ulysses_degree": 4}, "ulysses_degree 4", id="no-ring"),
        pytest.param({"strategy": "ring", "sp_degree": 2, "sp_across_nodes": True}, "sp_across_nodes", id="nodes"),
    ],
)
def test_configurations_that_it_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(exchange="symmetric", **options)


def test_it_is_never_the_default():
    assert ParallelConfig().exchange == "p2p"
    with pytest.raises(ValueError, match="unknown exchange 'nvshmem'; there are p2p, symmetric"):
        ParallelConfig(exchange="nvshmem")  # type: ignore[arg-type]


def gpu_rank(rank: int, size: int, folder: str) -> None:
    """Every strategy on real devices, `symmetric` against `p2p`."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        for name, options in (("fastseq", {"fastseq_overlap": "attention"}), ("ring", {})):
            config = ParallelConfig(strategy=name, sp_degree=size, attention_provider="torch", **options)
            mesh = build_mesh(sp_degree=size, device_type="cuda")
            p2p, peers = (build_strategy(replace(config, exchange=one), mesh) for one in ("p2p", "symmetric"))
            for rows in (512, 2048, 2049, 64):
                torch.manual_seed(rows)
                lengths = SequenceLengths(valid=rows * size, padded=rows * size)
                x = torch.randn(1, rows, 256, device="cuda")
                qkv = nn.Linear(256, 768, device="cuda")
                found = []
                for sp in (p2p, peers):
                    local = x.clone().requires_grad_()
                    out = sp.self_attention(local, qkv, num_heads=8, lengths=lengths)
                    found.append([out, *torch.autograd.grad(out.square().sum(), [local, qkv.weight, qkv.bias])])
                assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), (name, rows)
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_gpu_reads_its_own_symmetric_memory(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        group = dist.group.WORLD.group_name
        peer_access.require_peer_access(group)
        round_trips(symmetric.PeerMemory(group, torch.device("cuda", 0), 3 * 5 * 8), "cuda")
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_bits_are_those_of_nccl(tmp_path):
    size = min(torch.cuda.device_count(), 8)
    torch.multiprocessing.spawn(gpu_rank, (size, str(tmp_path)), nprocs=size)
