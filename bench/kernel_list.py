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


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One kernel to compile. launch has kernel, arguments, num_warps, num_stages and options.

    products is the number of matrix products of block_m x block_n x head_dim that one pass of its loop needs, 0 for a
    kernel without any; groups are the warpgroups of a program that share them. form is how it gets its inputs, one of
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
    )
    return [cases[0], own, *cases[1:]]


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
    calls: list[tuple[str, Any, tuple[Any, ...]]] = []
    for row, cu in ((_meta(1, WIDTH), None), (_meta(CLIPS, WIDTH), _meta(CLIPS + 1, dtype=torch.int32))):
        calls += [
            ("adaLN", adaln.adaln_modulate_fwd, (x, row, row, 1e-6, cu)),
            ("adaLN backward", adaln.adaln_modulate_bwd, (x, x, row, stat, stat, cu)),
            ("gated residual + adaLN", adaln.gated_residual_adaln_fwd, (x, x, row, row, row, 1e-6, cu)),
            (
                "gated residual + adaLN backward",
                adaln.gated_residual_adaln_bwd,
                (x, x, x, x, row, row, stat, stat, cu),
            ),
            ("gated residual", residual.gated_residual_fwd, (x, x, row, cu)),
            ("gated residual backward", residual.gated_residual_bwd, (x, x, row, cu)),
        ]
    calls += [
        ("bias + GELU", gelu.bias_gelu_fwd, (hidden, bias)),
        ("bias + GELU backward", gelu.bias_gelu_bwd, (hidden, hidden, bias)),
        ("LSE merge", merge.merge_attention_fwd, (out, lse, out, lse)),
        ("LSE merge backward", merge.merge_attention_bwd, (out, lse, out, lse, out, lse)),
        ("SP pack heads", layout.sp_pack_heads_fwd, (qkv, _meta(3, HEADS, 72), RANKS)),
        ("SP pack heads backward", layout.sp_pack_heads_bwd, (packed,)),
        ("SP unpack heads", layout.sp_unpack_heads_fwd, (packed,)),
        ("SP pack tokens", layout.sp_pack_tokens_fwd, (out, RANKS, local)),
        ("SP unpack tokens", layout.sp_unpack_tokens_fwd, (_meta(RANKS, 1, local, HEADS, 72), LENGTH)),
    ]
    cases: list[KernelCase] = []
    shared: set[tuple[str, str]] = set()
    for op, launcher, arguments in calls:
        for launch in captured_launches(launcher, *arguments):
            form = "" if launch.arguments.get("cu_seqlens") is None else "cu_seqlens"
            # The second stage of gradient sums is one kernel that many ops share: listed once.
            key = launch.kernel.__name__, form
            if key not in shared:
                cases.append(KernelCase(op=op, provider="triton", launch=launch, form=form))
            if launch.kernel.__name__ == "sum_slots_kernel":
                shared.add(key)
    return cases
