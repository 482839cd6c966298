"""longreel.parallel.strategies: layouts, gradients and traffic of each strategy against one device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from longreel.kernels.numerics import PARALLEL_TOLERANCE, relative_error
from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.models.sequence import AttentionShape, SequenceLengths
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.parallelize import Batch, ParallelDiT
from longreel.parallel.strategies import USP, FastSeq, Local, build_strategy
from longreel.parallel.strategies.layout import gather_heads, scatter_heads

HEADS, HEAD_DIM, TEXT, DEPTH = 8, 8, 6, 2
WIDTH = HEADS * HEAD_DIM
TOLERANCE = PARALLEL_TOLERANCE[torch.float64]
# Tokens: that no degree divides, that every degree does, and fewer than ranks; of traffic the first two kinds.
LENGTHS, TRAFFIC_LENGTHS = (13, 24, 3), (16, 13)
# Number of tokens; whether they attend to text, in the layout `published`, or to themselves.
Layer = tuple[int, bool]


STRATEGIES = [
    "ulysses",
    "ulysses-chunks",
    "fastseq-projection",
    "fastseq-attention",
    "fastseq-attention-kept",
    "ring",
    "usp",
    "usp-chunks",
]


def build(name: str, degree: int, *, lean: bool = False):
    """The strategy on all ranks; the ranks of USP are as near to half Ulysses as they can be."""
    name, _, form = name.partition("-")
    ulysses_degree = max(degree // 2, 1) if name == "usp" else None
    more = {}
    if form and name == "fastseq":
        overlap, _, kept = form.partition("-")
        more = {"fastseq_overlap": overlap, "fastseq_keep_gathered": bool(kept)}
    if form == "chunks" and ulysses_degree != 1:
        # One head at a time.
        more = {"head_chunks": HEADS // (ulysses_degree or degree)}
    config = ParallelConfig(strategy=name, sp_degree=degree, ulysses_degree=ulysses_degree, **more)
    sp = build_strategy(config, build_mesh(sp_degree=degree, ulysses_degree=ulysses_degree))
    return replace(sp, lean=True) if lean else sp


def padded_lengths(valid: int, degree: int) -> SequenceLengths:
    return SequenceLengths(valid=valid, padded=-(-valid // degree) * degree)


def pad(x: Tensor, lengths: SequenceLengths) -> Tensor:
    # Padding holds NaN-free garbage: nothing of it may reach a valid row.
    missing = lengths.padded - x.shape[1]
    return torch.cat([x, torch.full((x.shape[0], missing, *x.shape[2:]), 7.0, dtype=x.dtype)], dim=1)


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Bytes this rank hands to other ranks, seen at torch.distributed itself: a witness apart from comm.py."""
    sent = dict.fromkeys(("all_to_all", "p2p", "all_gather", "reduce_scatter"), 0)
    real_p2p = dist.batch_isend_irecv

    def size(x: Tensor) -> int:
        return x.numel() * x.element_size()

    def counting(kind: str, function: Callable, sent_bytes: Callable[[Tensor, Tensor, int], int]) -> Callable:
        def call(*args, group=None, **kwargs):
            # FSDP names them, output first.
            out, x = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            sent[kind] += sent_bytes(out, x, group.size())
            return function(*args, group=group, **kwargs)

        return call

    def counting_p2p(operations):
        sent["p2p"] += sum(size(o.tensor) for o in operations if o.op is dist.isend)
        return real_p2p(operations)

    rules = {
        "all_to_all": (("all_to_all_single",), lambda out, x, p: size(x) * (p - 1) // p),
        "all_gather": (("all_gather_single", "all_gather_into_tensor"), lambda out, x, p: size(x) * (p - 1)),
        "reduce_scatter": (("reduce_scatter_single", "reduce_scatter_tensor"), lambda out, x, p: size(out) * (p - 1)),
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", counting_p2p))
        for kind, (names, rule) in rules.items():
            for name in names:
                if hasattr(dist, name):
                    stack.enter_context(mock.patch.object(dist, name, counting(kind, getattr(dist, name), rule)))
        yield sent


def attention_inputs(num_tokens: int, *, cross: bool) -> tuple[Tensor, Tensor, nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    x = torch.randn(2, num_tokens, WIDTH, dtype=torch.float64)
    text = torch.randn(2, TEXT, WIDTH, dtype=torch.float64)
    query = nn.Linear(WIDTH, WIDTH if cross else 3 * WIDTH, dtype=torch.float64)
    return x, text, query, nn.Linear(WIDTH, 2 * WIDTH, dtype=torch.float64)


def run_attention(sp, x: Tensor, text: Tensor, query: nn.Linear, kv: nn.Linear, valid: int, *, cross: bool) -> Tensor:
    lengths, text_lengths = padded_lengths(valid, sp.degree), padded_lengths(TEXT, sp.degree)
    x_local = sp.shard(pad(x, lengths), 1)
    if cross:
        text_local = sp.shard(pad(text, text_lengths), 1)
        return sp.cross_attention(
            x_local, text_local, query, kv, num_heads=HEADS, lengths=lengths, text_lengths=text_lengths
        )
    return sp.self_attention(x_local, query, num_heads=HEADS, lengths=lengths)


def layer_results(sp, num_tokens: int, cross: bool) -> dict[str, Tensor]:
    """Output, dX and every dW of one attention layer on this rank."""
    x, text, query, kv = attention_inputs(num_tokens, cross=cross)
    x.requires_grad_()
    text.requires_grad_()
    out = run_attention(sp, x, text, query, kv, num_tokens, cross=cross)
    whole = sp.unshard(out, 1)[:, :num_tokens]
    torch.manual_seed(1)
    # Every rank's loss sees the whole output: unshard's backward sums their gradients.
    (whole * torch.randn_like(whole)).sum().div(sp.degree).backward()
    named = {"out": whole.detach(), "dx": x.grad, "dw": query.weight.grad, "db": query.bias.grad}
    return named | ({"dtext": text.grad, "dkv_w": kv.weight.grad, "dkv_b": kv.bias.grad} if cross else {})


@cache
def on_one_device(num_tokens: int, cross: bool) -> dict[str, Tensor]:
    return layer_results(Local(), num_tokens, cross)


def layer_errors(name: str, degree: int, layers: Sequence[Layer], lean: bool = False) -> dict[Layer, dict[str, float]]:
    """Output, dX and every dW of attention layers, against Local on one device; each rank returns them."""
    sp = build(name, degree, lean=lean)
    errors = {}
    for layer in layers:
        reference, parts = on_one_device(*layer), layer_results(sp, *layer)
        for key in sorted(parts.keys() - {"out"}):
            dist.all_reduce(parts[key])
        errors[layer] = {key: relative_error(parts[key], reference[key]) for key in reference}
    return errors


@pytest.fixture(scope="module")
def once(worker_pool) -> Callable[..., list]:
    """once(fn, world_size, *args): results by rank, of one call for all tests that ask the same."""
    return cache(worker_pool.run)


# The layers of a strategy and degree are run in one call: groups of ranks cost more than layers.
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross_published"])
@pytest.mark.parametrize("num_tokens", LENGTHS, ids=lambda n: f"S{n}")
@pytest.mark.parametrize("degree", [1, 2, 4, 8], ids=lambda p: f"P{p}")
@pytest.mark.parametrize("name", STRATEGIES)
def test_output_and_gradients_equal_one_device(once, name, degree, num_tokens, cross):
    layers = tuple(itertools.product(LENGTHS, (False, True)))
    for errors in once(layer_errors, degree, name, degree, layers):
        assert max(errors[num_tokens, cross].values()) <= TOLERANCE, errors[num_tokens, cross]


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross_published"])
@pytest.mark.parametrize("name", ["ulysses-chunks", "fastseq-projection", "fastseq-attention", "usp"])
def test_lean_output_and_gradients_equal_one_device(once, name, cross):
    for errors in once(layer_errors, 4, name, 4, ((13, False), (13, True)), True):
        assert max(errors[13, cross].values()) <= TOLERANCE, errors[13, cross]


def traffic_of_layers(name: str, degree: int, batch: int, layers: Sequence[Layer], lean: bool) -> dict[Layer, tuple]:
    sp = build(name, degree, lean=lean)
    return {layer: traffic_of_layer(sp, batch, *layer) for layer in layers}


def traffic_of_layer(sp, batch: int, num_tokens: int, cross: bool) -> tuple:
    x, text, query, kv = (v[:batch] if isinstance(v, Tensor) else v for v in attention_inputs(num_tokens, cross=cross))
    x.requires_grad_()
    text.requires_grad_()
    with counted_bytes() as forward:
        out = run_attention(sp, x, text, query, kv, num_tokens, cross=cross)
    with counted_bytes() as backward:
        out.sum().backward()
    shape = AttentionShape(
        batch=batch,
        seq_len=num_tokens,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        element_size=8,
        kv_len=TEXT if cross else None,
    )
    return sp.traffic(shape), forward, backward


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross_published"])
@pytest.mark.parametrize("num_tokens", TRAFFIC_LENGTHS, ids=lambda n: f"S{n}")
@pytest.mark.parametrize("degree", [2, 4, 8], ids=lambda p: f"P{p}")
@pytest.mark.parametrize(
    ("name", "lean"),
    [
        ("ulysses", False),
        ("ulysses", True),
        ("fastseq", False),
        ("fastseq", True),
        ("fastseq-projection-kept", False),
        ("ring", False),
        ("usp", False),
        ("usp", True),
    ],
)
def test_traffic_formula_equals_bytes_passed_to_the_collectives(once, name, lean, degree, num_tokens, cross):
    layers = tuple(itertools.product(TRAFFIC_LENGTHS, (False, True)))
    for by_layer in once(traffic_of_layers, degree, name, degree, 2, layers, lean):
        traffic, forward, backward = by_layer[num_tokens, cross]
        for formula, seen in ((traffic.forward, forward), (traffic.backward, backward)):
            assert formula.get("all_to_all", 0) == seen["all_to_all"]
            assert sum(formula.get(kind, 0) for kind in ("all_gather", "reduce_scatter", "send_recv")) == seen["p2p"]
            assert seen["all_gather"] == seen["reduce_scatter"] == 0


def traffic_of_step(name: str, degree: int, policy: str) -> tuple:
    """What the formula says one attention layer sends, and what a step of a model of DEPTH layers sent."""
    config = DiTConfig(
        depth=DEPTH, hidden_size=WIDTH, num_heads=HEADS, mlp_ratio=2.0, text_dim=16, max_text_tokens=TEXT
    )
    parallel = ParallelConfig(
        strategy=name,
        sp_degree=degree,
        ulysses_degree=2 if name == "usp" else None,
        policy=policy,
        precision="fp64",
        attention_provider="torch",
    )
    mesh = build_mesh(sp_degree=degree, ulysses_degree=parallel.ulysses_degree)
    spread = ParallelDiT(DiT(config).double(), mesh, parallel)
    clip, text = torch.randn(1, 3, 6, 10, config.in_channels), torch.randn(1, TEXT, 16)
    batch = Batch(latents=clip, noise=clip, timestep=torch.rand(1), text=text, global_samples=1)
    with counted_bytes() as forward:
        loss = spread.loss(batch)
    with counted_bytes() as backward:
        spread.engine.backward(loss)
    # 45 patches, which neither degree divides.
    num_tokens = math.prod(config.grid(3, 6, 10))
    shape = AttentionShape(batch=1, seq_len=num_tokens, num_heads=HEADS, head_dim=HEAD_DIM, element_size=8)
    return spread.strategy.traffic(shape), forward, backward


@pytest.mark.parametrize("policy", ["none", "full", "keep_attention", "offload"])
@pytest.mark.parametrize("name", ["ulysses", "fastseq", "ring", "usp"])
def test_traffic_of_a_step_is_that_of_its_layers_and_of_what_is_recomputed(run_distributed, name, policy):
    for traffic, forward, backward in run_distributed(traffic_of_step, 4, name, 4, policy):
        again = {kind: traffic.forward[kind] if policy == "full" else 0 for kind in traffic.forward}
        backwards = {kind: traffic.backward[kind] + again.get(kind, 0) for kind in traffic.backward}
        for formula, seen in ((traffic.forward, forward), (backwards, backward)):
            assert DEPTH * formula.get("all_to_all", 0) == seen["all_to_all"]
            passed = sum(formula.get(kind, 0) for kind in ("all_gather", "reduce_scatter", "send_recv"))
            assert DEPTH * passed == seen["p2p"]


@pytest.mark.parametrize(
    ("name", "degree", "gigabytes"),
    [
        ("ulysses", 2, 1.89),
        ("ulysses", 4, 1.42),
        ("ulysses", 8, 0.83),
        ("fastseq", 2, 1.42),
        ("fastseq", 4, 1.77),
        ("fastseq", 8, 1.86),
        ("ring", 2, 1.89),
        ("ring", 4, 2.83),
        ("ring", 8, 3.30),
    ],
)
def test_traffic_equals_the_known_table(name, degree, gigabytes):
    shape = AttentionShape(batch=1, seq_len=819_200, num_heads=16, head_dim=72, element_size=2)
    sp = {
        "ulysses": USP(group="sp", degree=degree, ulysses_group="sp", ulysses_degree=degree, ring_group=""),
        "fastseq": FastSeq(group="sp", degree=degree),
        "ring": USP(group="sp", degree=degree, ulysses_group="", ulysses_degree=1, ring_group="sp"),
    }[name]
    assert sp.traffic(shape).forward_bytes / 1e9 == pytest.approx(gigabytes, abs=0.006)


def layout_round_trip(degree: int) -> bool:
    mesh = build_mesh(sp_degree=degree)
    torch.manual_seed(dist.get_rank())
    x = torch.randn(2, 3, 3, HEADS, HEAD_DIM)
    heads = scatter_heads(x, mesh.sp_group)
    everyone = [torch.empty_like(x) for _ in range(degree)]
    dist.all_gather(everyone, x)
    own = HEADS // degree
    mine = torch.cat(everyone, dim=1)[:, :, :, dist.get_rank() * own : (dist.get_rank() + 1) * own]
    return torch.equal(heads, mine) and torch.equal(gather_heads(heads, mesh.sp_group), x)


@pytest.mark.parametrize("degree", [2, 4, 8], ids=lambda p: f"P{p}")
def test_layout_changes_are_exact_and_inverse(run_distributed, degree):
    assert all(run_distributed(layout_round_trip, degree, degree))


def shard_unshard_gradients(degree: int) -> tuple[bool, bool, bool]:
    sp = build("ulysses", degree)
    rank = dist.get_rank()
    x = torch.arange(4.0 * degree).reshape(1, -1).requires_grad_()
    part = sp.shard(x, 1)
    whole = sp.unshard(part, 1)
    (whole * (rank + 1)).sum().backward()
    expected = torch.zeros(1, 4 * degree)
    expected[:, rank * 4 : rank * 4 + 4] = sum(range(1, degree + 1))
    return torch.equal(whole, x), torch.equal(x.grad, expected), part.shape[1] == 4


def test_shard_and_unshard_sum_gradients_without_scaling(run_distributed):
    assert all(all(r) for r in run_distributed(shard_unshard_gradients, 4, 4))


def flops_of_layer(name: str, degree: int) -> float:
    sp = build(name, degree)
    x, text, query, kv = attention_inputs(16, cross=False)
    with FlopCounterMode(display=False) as counter:
        run_attention(sp, x.requires_grad_(), text, query, kv, 16, cross=False).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", STRATEGIES)
def test_flops_of_all_ranks_add_up_to_those_of_one_device(run_distributed, name):
    one_device = run_distributed(flops_of_layer, 1, "local", 1)[0]
    projection, attention = 3 * 2 * 2 * 16 * WIDTH * 3 * WIDTH, 7 * 2 * 2 * 16 * 16 * WIDTH
    assert one_device == projection + attention
    assert sum(run_distributed(flops_of_layer, 4, name, 4)) == one_device


def heads_error(name: str) -> str:
    x, text, query, kv = attention_inputs(12, cross=False)
    try:
        run_attention(build(name, 3), x, text, query, kv, 12, cross=False)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["ulysses", "fastseq"])
def test_indivisible_heads_name_the_degrees_that_work(run_distributed, name):
    for message in run_distributed(heads_error, 3, name):
        assert (
            message
            == "num_heads 8 does not divide by sp_degree 3; degrees that work: 1, 2, 4, 8; strategy ring takes any"
        )


def compiled_layer(name: str, degree: int, cross: bool) -> bool:
    sp = build(name, degree)
    x, text, query, kv = attention_inputs(13, cross=cross)

    lengths, text_lengths = padded_lengths(13, degree), padded_lengths(TEXT, degree)
    x, text = sp.shard(pad(x, lengths), 1), sp.shard(pad(text, text_lengths), 1)

    def layer(x: Tensor) -> Tensor:
        if cross:
            both = {"lengths": lengths, "text_lengths": text_lengths}
            return sp.cross_attention(x, text, query, kv, num_heads=HEADS, **both)
        return sp.self_attention(x, query, num_heads=HEADS, lengths=lengths)

    # Workers live on from test to test, and compile one function a few times only.
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    grads = []
    for fn in (layer, compiled):
        x = x.detach().requires_grad_()
        out = fn(x)
        out.square().sum().backward()
        grads.append((out.detach(), x.grad, query.weight.grad.clone()))
        query.zero_grad()
    return all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross_published"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_compiles_without_graph_breaks(run_distributed, name, cross):
    assert all(run_distributed(compiled_layer, 2, name, 2, cross, timeout=240))
