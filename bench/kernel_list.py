"""Every Triton kernel of the suite at its production arguments, DiT-XL/2 at 819,200 tokens in bf16, as launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LENGTH = 819_200
WIDTH = 1152
HEADS = 16
RANKS = 8
HEAD_DIMS = (64, 72, 128)
# Text tokens of cross attention, and clips of a packed sequence.
TEXT = 960
CLIPS = 8
# How attention gets its inputs: views of the projection's [B, S, 3, H, D] output (attention_packed), or q beside
# [B, T, 2, H, D] (cross attention); each as one sequence or as clips of any lengths.
FORMS = ("qkv", "qkv, cu_seqlens", "q, kv", "q, kv, cu_seqlens")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTraffic:
    """What a memory-bound kernel moves: tensors of so many elements in bf16, of each a tile in a pass.

    second_stages counts the launches that then add up partial sums, each in so many passes of a program.
    """

    reads: int
    writes: int
    elements: int
    tile_elements: int
    second_stages: int = 0
    stage_passes: int = 0


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One kernel to compile. launch has kernel, arguments, num_programs, num_warps, num_stages and options.

    products is the number of matrix products of block_m x block_n x head_dim that one pass of its loop needs, 0 for a
    kernel without any; groups are the warpgroups of a program that share them; streamed_bytes are what the pass reads
    from memory or adds to it. traffic is what a memory-bound kernel moves. form is how it gets its inputs, one of
    FORMS or, for the others, "cu_seqlens" where modulation is per packed clip.
    """

    op: str
    provider: str
    launch: Any
    form: str = ""
    head_dim: int = 0
    products: int = 0
    block_m: int = 0
    block_n: int = 0
    groups: int = 0
    streamed_bytes: int = 0
    traffic: RowTraffic | None = None
    planned_programs: int = 1

    @property
    def name(self) -> str:
        """Of the kernel, without its suffix."""
        return str(self.launch.kernel.__name__).removesuffix("_kernel")


def kernel_cases(head_dims: tuple[int, ...] = HEAD_DIMS) -> list[KernelCase]:
    """All of them; makes no tensor with storage and launches nothing."""
    attention = [case for head_dim in head_dims for case in _attention(head_dim)]
    return attention + _memory_bound()


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _attention(head_dim: int) -> list[KernelCase]:
    # At the DiT's own width every form that its models launch, at the others those of one sequence and of packed clips.
    forms = FORMS if head_dim == 72 else FORMS[:2]
    return [case for form in forms for case in _attention_form(head_dim, form)]


def _attention_form(head_dim: int, form: str) -> list[KernelCase]:
    from longreel.kernels import triton_attention_hopper as hopper
    from longreel.kernels.triton_attention_plan import plan_backward, plan_forward

    if form.startswith("qkv"):
        q, k, v = _meta(1, LENGTH, 3, HEADS, head_dim).unbind(2)
        grads: Sequence[Tensor] = _meta(1, LENGTH, 3, HEADS, head_dim).unbind(2)
    else:
        q, keys = _meta(1, LENGTH, HEADS, head_dim), _meta(1, TEXT, 2, HEADS, head_dim)
        (k, v), grads = keys.unbind(2), [q, *(_meta(1, TEXT, HEADS, head_dim) for _ in "kv")]
    cu = _meta(CLIPS + 1, dtype=torch.int32) if form.endswith("cu_seqlens") else None
    out, lse = _meta(1, LENGTH, HEADS, head_dim), _meta(1, HEADS, LENGTH, dtype=torch.float32)
    dq_sum = _meta(1, HEADS, LENGTH, head_dim, dtype=torch.float32)
    scale = head_dim**-0.5
    backward = (grads, out, None, (q, k, v), out, lse, scale, cu, cu)
    delta, dkdv, dq = plan_backward(*backward)
    plans = [
        ("attention", "triton", 2, plan_forward(q, k, v, out, lse, scale, cu, cu)),
        ("attention backward", "triton", 0, delta),
        ("attention backward", "triton", 4, dkdv),
        ("attention backward", "triton", 3, dq),
        ("attention backward", "triton-atomic", 5, plan_backward(*backward, dq_sum)[1]),
    ]
    cases = [
        KernelCase(
            op=op,
            provider=provider,
            launch=plan,
            form=form,
            head_dim=head_dim,
            products=products,
            block_m=plan.arguments.get("BLOCK_M", 0),
            block_n=plan.arguments.get("BLOCK_N", 0),
            groups=plan.num_warps // 4,
            streamed_bytes=_streamed(products, plan.arguments, head_dim) if products else 0,
            planned_programs=plan.planned_programs,
        )
        for op, provider, products, plan in plans
    ]
    plan = hopper.plan_forward(q, k, v, out, lse, scale, cu, cu)
    consumers = plan.arguments["CONSUMERS"]
    own = KernelCase(
        op="attention",
        provider="triton-hopper",
        launch=plan,
        form=form,
        head_dim=head_dim,
        products=2,
        block_m=64 * consumers,
        block_n=plan.arguments["BLOCK_N"],
        groups=consumers,
        streamed_bytes=_streamed(2, plan.arguments, head_dim),
    )
    return [cases[0], own, *cases[1:]]


def _streamed(products: int, arguments: dict[str, Any], head_dim: int) -> int:
    """Bytes of one pass: keys and values, or, for dk and dv, q, dout, lse, delta and, with 5 products, dq in fp32."""
    if products < 4:
        return int(arguments["BLOCK_N"]) * 2 * 2 * head_dim
    return int(arguments["BLOCK_M"]) * (2 * 2 * head_dim + 2 * 4 + (4 * head_dim if products == 5 else 0))


def _memory_bound() -> list[KernelCase]:
    from longreel.kernels import triton_adaln as adaln
    from longreel.kernels import triton_gelu as gelu
    from longreel.kernels import triton_lse_merge as merge
    from longreel.kernels import triton_residual as residual
    from longreel.kernels import triton_sp_layout as layout
    from longreel.kernels.triton_capture import captured_launches

    x = _meta(1, LENGTH, WIDTH)
    hidden, bias = _meta(1, LENGTH, 4 * WIDTH), _meta(4 * WIDTH)
    stat = _meta(1, LENGTH, dtype=torch.float32)
    out, lse = _meta(1, LENGTH, HEADS, 72), _meta(1, HEADS, LENGTH, dtype=torch.float32)
    local = LENGTH // RANKS
    qkv = _meta(1, local, 3, HEADS, 72)
    packed = _meta(RANKS, 1, local, 3, HEADS // RANKS, 72)
    tokens, width = x.numel(), hidden.numel()
    # Op, its launcher and arguments, and what its main kernel reads and writes: tensors, and elements of each.
    calls: list[tuple[str, Any, tuple[Any, ...], tuple[int, int, int]]] = []
    for row, cu in ((_meta(1, WIDTH), None), (_meta(CLIPS, WIDTH), _meta(CLIPS + 1, dtype=torch.int32))):
        calls += [
            ("adaLN", adaln.adaln_modulate_fwd, (x, row, row, 1e-6, cu), (1, 1, tokens)),
            ("adaLN backward", adaln.adaln_modulate_bwd, (x, x, row, stat, stat, cu), (2, 1, tokens)),
            (
                "gated residual + adaLN",
                adaln.gated_residual_adaln_fwd,
                (x, x, row, row, row, 1e-6, cu),
                (2, 2, tokens),
            ),
            (
                "gated residual + adaLN backward",
                adaln.gated_residual_adaln_bwd,
                (x, x, x, x, row, row, stat, stat, cu),
                (4, 2, tokens),
            ),
            ("gated residual", residual.gated_residual_fwd, (x, x, row, cu), (2, 1, tokens)),
            ("gated residual backward", residual.gated_residual_bwd, (x, x, row, cu), (2, 1, tokens)),
        ]
    gathered = _meta(RANKS, 1, local, HEADS, 72)
    calls += [
        ("bias + GELU", gelu.bias_gelu_fwd, (hidden, bias), (1, 1, width)),
        ("bias + GELU backward", gelu.bias_gelu_bwd, (hidden, hidden, bias), (2, 1, width)),
        ("LSE merge", merge.merge_attention_fwd, (out, lse, out, lse), (2, 1, tokens)),
        ("LSE merge backward", merge.merge_attention_bwd, (out, lse, out, lse, out, lse), (3, 2, tokens)),
        ("SP pack heads", layout.sp_pack_heads_fwd, (qkv, _meta(3, HEADS, 72), RANKS), (1, 1, qkv.numel())),
        ("SP pack heads backward", layout.sp_pack_heads_bwd, (packed,), (1, 1, qkv.numel())),
        ("SP unpack heads", layout.sp_unpack_heads_fwd, (packed,), (1, 1, qkv.numel())),
        ("SP pack tokens", layout.sp_pack_tokens_fwd, (out, RANKS, local), (1, 1, tokens)),
        ("SP unpack tokens", layout.sp_unpack_tokens_fwd, (gathered, LENGTH), (1, 1, tokens)),
    ]
    cases: list[KernelCase] = []
    shared: set[str] = set()
    for op, launcher, arguments, (reads, writes, elements) in calls:
        main, *stages = captured_launches(launcher, *arguments)
        form = "" if main.arguments.get("cu_seqlens") is None else "cu_seqlens"
        traffic = RowTraffic(
            reads=reads,
            writes=writes,
            elements=elements,
            tile_elements=_tile_elements(main.arguments),
            second_stages=len(stages),
            stage_passes=_stage_passes(main.arguments, stages[0].arguments) if stages else 0,
        )
        cases.append(KernelCase(op=op, provider="triton", launch=main, form=form, traffic=traffic))
        # The second stage of gradient sums is one kernel that many ops share: listed once.
        if stages and form not in shared:
            cases.append(KernelCase(op=op, provider="triton", launch=stages[0], form=form))
            shared.add(form)
    return cases


def _stage_passes(main: dict[str, Any], stage: dict[str, Any]) -> int:
    """Passes of a program of the second stage over the slots of one segment, segments being alike."""
    rows = main["num_tokens" if "num_tokens" in main else "num_rows"]
    slots = rows // main.get("num_segments", 1) // main["CHUNK"] + 1
    return -(-slots // int(stage["BLOCK_P"]))


def _tile_elements(arguments: dict[str, Any]) -> int:
    """Of one pass: a flat block, or rows of a block of columns, of a head or of all columns."""
    if "BLOCK" in arguments:
        return int(arguments["BLOCK"])
    columns = next(arguments[name] for name in ("BLOCK_C", "D", "C") if name in arguments)
    return int(arguments.get("ROWS", 1) * columns)
