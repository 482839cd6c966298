"""longreel.kernels.sp_layout: against indexing written out, the bias's gradient; Triton interpreted and compiled."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from longreel.kernels import pack_heads, pack_tokens, unpack_heads, unpack_tokens
from longreel.kernels.numerics import KERNEL_ERROR_FACTOR, relative_error
from longreel.kernels.sp_layout import sp_pack_heads_backward_op

# Ranks, batch, tokens of a rank, G, heads of a rank, D: one rank, one row, widths that are and are not multiples of 8.
SHAPES = [
    (2, 2, 3, 3, 2, 72),
    (4, 1, 5, 3, 1, 40),
    (1, 2, 3, 2, 3, 8),
    (3, 2, 1, 1, 2, 5),
    (8, 3, 7, 2, 1, 16),
    (2, 1, 3, 3, 3, 64),
    (3, 2, 3, 3, 1, 96),
    (2, 1, 1, 3, 1, 128),
]
SHAPE_IDS = [f"P{p}-B{b}-s{s}-G{g}-h{h}-D{d}" for p, b, s, g, h, d in SHAPES]


def tokens_of(ranks: int, batch: int, s: int, parts: int, heads: int, head_dim: int) -> Tensor:
    """[B, s, G, H, D], every element its own number."""
    shape = (batch, s, parts, ranks * heads, head_dim)
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) / 8


def by_hand(x: Tensor, ranks: int) -> Tensor:
    """[P, B, s, G, h, D] by slicing: rank r gets heads r h and on."""
    heads = x.shape[3] // ranks
    return torch.stack([x[:, :, :, r * heads : (r + 1) * heads] for r in range(ranks)])


def check_layouts(shape: tuple[int, ...], provider: str, device: str = "cpu") -> None:
    ranks, _, s, *_ = shape
    x = tokens_of(*shape).to(device)
    packed = by_hand(x, ranks)
    got = pack_heads(x, num_ranks=ranks, provider=provider)
    assert got.is_contiguous() and torch.equal(got, packed)
    # Heads before tokens in memory, and a part of a wider buffer.
    wide = torch.cat((x, x), -1)[..., : x.shape[-1]]
    for strided in (x.transpose(1, 3).contiguous().transpose(1, 3), wide):
        assert torch.equal(pack_heads(strided, num_ranks=ranks, provider=provider), packed)
    assert torch.equal(unpack_heads(packed, provider=provider), x)
    assert torch.equal(unpack_heads(packed.transpose(-1, -2).contiguous().transpose(-1, -2), provider=provider), x)
    for tokens in {ranks * s, ranks * s - 1, (ranks - 1) * s - 1, 1, 0}:
        if tokens < 0:
            continue
        # Ranks in order, each with its rows; what is beyond the sequence is dropped one way and zero the other.
        whole = torch.cat([packed[r] for r in range(ranks)], dim=1)[:, :tokens]
        assert torch.equal(unpack_tokens(packed, tokens=tokens, provider=provider), whole)
        padded = packed.clone()
        for r in range(ranks):
            padded[r, :, max(0, tokens - r * s) :] = 0
        got = pack_tokens(whole.contiguous(), num_ranks=ranks, rows=s, provider=provider)
        assert got.is_contiguous() and torch.equal(got, padded)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_every_element_goes_where_indexing_says(shape):
    check_layouts(shape, "torch")


def check_layouts_poisoned(shape: tuple[int, ...]) -> None:
    real = torch.Tensor.new_empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: real(*a, **k).fill_(float("nan")))
        check_layouts(shape, "triton")


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_triton_puts_every_element_there_too(run_interpreted, shape):
    run_interpreted(check_layouts_poisoned, shape)


def biased(x: Tensor, bias: Tensor, ranks: int, provider: str) -> list[Tensor]:
    """packed, dx and dbias for a random upstream gradient."""
    x, bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    packed = pack_heads(x, num_ranks=ranks, bias=bias, provider=provider)
    torch.manual_seed(1)
    upstream = torch.randn(packed.shape, dtype=torch.float16).to(packed)
    return [packed.detach(), *torch.autograd.grad(packed, (x, bias), upstream)]


def bias_errors(
    shape: tuple[int, ...], dtype: torch.dtype, min_programs: int, device: str
) -> list[tuple[float, float]]:
    """(error of Triton, error of eager) against fp64 for packed, dx and dbias."""
    from longreel.kernels import triton_rows

    ranks = shape[0]
    torch.manual_seed(0)
    x = torch.randn(tokens_of(*shape).shape).to(dtype).to(device)
    bias = torch.randn(x.shape[2:].numel()).to(dtype).to(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_rows, "MIN_PROGRAMS", min_programs)
        real = torch.empty
        patch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(float("nan")))
        got = biased(x, bias, ranks, "triton")
    wide = x.double(), bias.double()
    eager = [by_hand(x + bias.view(x.shape[2:]), ranks)]
    want = [by_hand(wide[0] + wide[1].view(x.shape[2:]), ranks)]
    torch.manual_seed(1)
    dpacked = torch.randn(eager[0].shape, dtype=torch.float16).to(device)
    for results, d in ((eager, dpacked.to(dtype)), (want, dpacked.double())):
        dx = torch.cat(list(d), dim=3)
        results += [dx, dx.sum((0, 1)).flatten()]
    return [(relative_error(a, w), relative_error(e, w)) for a, e, w in zip(got, eager, want, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 129, 3, 3, 8)], ids=[*SHAPE_IDS, "P2-B1-s129-G3-h3-D8"])
def test_bias_and_its_gradient_err_as_eager_does(run_interpreted, shape, dtype):
    # fp32: as many programs as there are tiles of tokens, fp16: all tokens in one.
    for got, eager in run_interpreted(bias_errors, shape, dtype, 1056 if dtype == torch.float32 else 1, "cpu"):
        assert got <= KERNEL_ERROR_FACTOR * eager + torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_specifications_pass_gradcheck(shape):
    ranks, _, s, parts, heads, head_dim = shape
    x = torch.randn(1, 2, parts, ranks * heads, head_dim, dtype=torch.float64)[..., :2].clone().requires_grad_()
    bias = torch.randn(parts * ranks * heads * 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: pack_heads(a, num_ranks=ranks, bias=b), (x, bias))
    whole = torch.randn(2, ranks * s - 1 or 1, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: unpack_tokens(pack_tokens(a, num_ranks=ranks, rows=s), tokens=1), whole)
    packed = torch.randn(ranks, 2, 2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unpack_heads, packed)


def test_nothing_is_copied_where_nothing_moves():
    x = tokens_of(2, 1, 3, 3, 1, 8)
    whole = x.view(1, 6, 3, 1, 8)
    packed = pack_tokens(whole, num_ranks=2)
    assert packed.is_contiguous() and packed.data_ptr() == whole.data_ptr()
    assert unpack_tokens(packed, tokens=5).data_ptr() == packed.data_ptr()
    assert pack_heads(x, num_ranks=1).data_ptr() == unpack_heads(x.unsqueeze(0)).data_ptr() == x.data_ptr()


def test_compiles_without_graph_breaks():
    def there_and_back(x: Tensor, bias: Tensor) -> Tensor:
        packed = pack_heads(x, num_ranks=2, bias=bias)
        return pack_tokens(unpack_tokens(packed, tokens=5), num_ranks=2)

    x, bias = torch.randn(2, 3, 3, 4, 8, requires_grad=True), torch.randn(96, requires_grad=True)
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    results = []
    for fn in (there_and_back, compiled):
        out = fn(x, bias)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (x, bias))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: pack_heads(x[0], num_ranks=2), r"x must be \[B, s, G, H, D\], got \[3, 3, 4, 8\]"),
        (lambda x: pack_heads(x, num_ranks=3), r"num_ranks 3 must divide the 4 heads of x; what would: \[1, 2, 4\]"),
        (lambda x: pack_heads(x, num_ranks=0), "num_ranks must be at least 1, got 0"),
        (lambda x: pack_heads(x, num_ranks=2, bias=x[0, 0, 0, 0]), r"bias must be \[96\] .* got \[8\]"),
        (lambda x: pack_heads(x, num_ranks=2, bias=x[0, 0].flatten().double()), "bias has dtype torch.float64"),
        (lambda x: unpack_heads(x), r"packed must be \[P, B, s, G, h, D\], got \[2, 3, 3, 4, 8\]"),
        (lambda x: unpack_tokens(x), r"packed must be \[P, B, s, G, h, D\]"),
        (lambda x: unpack_tokens(x.unsqueeze(0), tokens=4), "tokens 4 must be 0 to 3"),
        (lambda x: pack_tokens(x[0], num_ranks=2), r"x must be \[B, T, G, h, D\]"),
        (lambda x: pack_tokens(x, num_ranks=2, rows=1), "rows 1 x 2 ranks hold fewer than the 3 tokens of x"),
        (lambda x: pack_tokens(x, num_ranks=0), "num_ranks must be at least 1, got 0"),
        (lambda x: pack_heads(x, num_ranks=2, provider="triton"), "needs a CUDA device, got tensors on cpu"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.randn(2, 3, 3, 4, 8))


def production_kernels(tokens: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Kernel and arguments of DiT-XL/2 on 8 ranks, bf16, this many tokens a rank."""
    from longreel.kernels import triton_sp_layout as kernels

    half = torch.bfloat16
    block = kernels.block_options("unpack", tokens)
    heads = {"num_rows": 3 * tokens, "P": 8, "W": 144, "VEC": 16, **block}
    blocks = {"num_blocks": -(-3 * tokens * 144 // block["BLOCK"])}
    move = {"whole": half, "packed": half, "batch": 2, "tokens": 8 * tokens - 3, "rows": tokens, "Z": 3 * 144}
    move |= block | blocks
    summed = {"dpacked": half, "dx": half, "slots": torch.float32, "num_tokens": tokens, "CHUNK": 256}
    return {
        "pack_heads": (kernels.pack_heads_kernel, heads | blocks | {"x": half, "bias": None, "packed": half, "G": 3}),
        "pack_heads_bias": (
            kernels.pack_heads_kernel,
            heads | blocks | {"x": half, "bias": half, "packed": half, "G": 3},
        ),
        "unpack_heads": (kernels.unpack_heads_kernel, heads | {"x": half, "packed": half}),
        "pack_heads_bwd": (
            kernels.pack_heads_bwd_kernel,
            summed | kernels.tile_options(432, tokens) | {"P": 8, "G": 3, "W": 144},
        ),
        "pack_tokens": (kernels.move_tokens_kernel, move | {"PACK": True}),
        "unpack_tokens": (kernels.move_tokens_kernel, move | {"PACK": False}),
    }


@pytest.mark.parametrize("tokens", [102_400, 102_401], ids=["even", "odd"])
@pytest.mark.parametrize(
    "name", ["pack_heads", "pack_heads_bias", "unpack_heads", "pack_heads_bwd", "pack_tokens", "unpack_tokens"]
)
def test_compiles_for_hopper_with_16_byte_loads(compile_kernel, name, tokens):
    kernel, arguments = production_kernels(tokens)[name]
    num_warps = arguments.pop("num_warps")
    compiled = compile_kernel(kernel, arguments, num_warps=num_warps)
    assert compiled.spills == compiled.local_bytes == 0
    widths = set(re.findall(r"(?:ld|st)\.global\S*?(\.v\d)?\.b(\d+)", compiled.ptx))
    # Nothing narrower than 16 bytes, but for the fp32 sums over tokens.
    assert {(".v4", "32")} <= widths <= {(".v4", "32")} | ({("", "32")} if name == "pack_heads_bwd" else set())
    # Four 16-byte loads a thread and program: an H200's bandwidth times its latency is about 26 KiB.
    assert compiled.programs_per_sm() * 2 * arguments.get("BLOCK", 4096) >= 26 * 1024
    assert not re.findall(r"arith\.muli .*: (?:tensor<[^>]*x)?i32", compiled.ttir)


@pytest.mark.parametrize("head_dim", [8, 40, 72])
def test_every_head_dim_moves_16_bytes(compile_kernel, head_dim):
    kernel, arguments = production_kernels(102_401)["pack_heads_bias"]
    num_warps = arguments.pop("num_warps")
    compiled = compile_kernel(kernel, arguments | {"W": head_dim, "VEC": 8}, num_warps=num_warps)
    assert set(re.findall(r"(?:ld|st)\.global\S*?(\.v\d)?\.b(\d+)", compiled.ptx)) == {(".v4", "32")}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_on_the_gpu_every_element_goes_there_too(shape):
    check_layouts(shape, "triton", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (8, 2, 4099, 3, 2, 72)], ids=[*SHAPE_IDS, "P8-B2-s4099-G3-h2-D72"])
def test_on_the_gpu_bias_and_its_gradient_err_as_eager_does(shape, dtype):
    for got, eager in bias_errors(shape, dtype, 1056, "cuda"):
        assert got <= KERNEL_ERROR_FACTOR * eager + torch.finfo(dtype).eps


@pytest.mark.gpu
def test_on_the_gpu_offsets_pass_31_bits_and_two_runs_are_equal():
    torch.manual_seed(0)
    x = torch.randn(1, 819_203, 3, 16, 72, device="cuda", dtype=torch.bfloat16)
    packed = pack_heads(x, num_ranks=8, provider="triton")
    assert torch.equal(packed[7, 0, -5:], x[0, -5:, :, 14:])
    assert torch.equal(unpack_heads(packed, provider="triton"), x)
    grads = [sp_pack_heads_backward_op(packed, "triton") for _ in range(2)]
    assert torch.equal(grads[0][0], x) and torch.equal(grads[0][1], grads[1][1])
    want = x.double().sum((0, 1)).flatten()
    assert relative_error(grads[0][1], want) < 2 * torch.finfo(torch.bfloat16).eps
