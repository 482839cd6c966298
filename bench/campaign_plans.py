"""What a campaign measures, in the order of what matters most: on a Hopper GPU, and as a rehearsal on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from longreel.bench.campaign_validate import Part
from longreel.bench.micro_options import HOPPER, MEASURED_OPS
from longreel.bench.micro_sweep import MicroPlan, sweep_cases
from longreel.bench.ops import ATTENTION_OPS, OpCase
from longreel.bench.providers import kernel_providers, known_providers
from longreel.bench.timing import TimingRule
from longreel.bench.tune_plans import TunePlan, attention_targets, hopper_plans, row_targets

_ALL_POINTWISE = tuple(op for op in MEASURED_OPS if op not in ATTENTION_OPS)
# What nine minutes do not hold: the same kernels with offsets, and the layout changes that move less.
_FURTHER = ("adaln_frames", "gated_adaln_frames", "sp_pack_tokens", "sp_unpack_tokens")
_POINTWISE = tuple(op for op in _ALL_POINTWISE if op not in _FURTHER)
BEFORE, AFTER = "before", "after"
# What a provider may take for compilation and the gate: the campaign has seconds to spend on one that hangs.
_SETUP_S = 20.0
# Seconds of a case at hundreds of thousands of tokens, where one forward and backward takes several.
LONG_CASE_S = 80.0
_TIMED = TimingRule(min_samples=5, max_samples=30, budget_s=0.1, wall_cap_s=20.0, warm_up_s=0.02)


@dataclass(frozen=True, kw_only=True, slots=True)
class CampaignPlan:
    """Everything that a campaign's steps do, as data.

    Args:
        device: torch device. validate: tests, part after part.
        rooflines: cases of the ceilings. sustained_s: window of the sustained ones.
        micro: plans in order; what is not reached within the budget is left for the next run of the command.
        tune: the constants that matter most. micro_after: plans measured again with the constants chosen.
        tune_more, micro_more: what follows in the time that is left over, or in the next run of the command.
        interpret: Triton kernels are interpreted.
    """

    device: str
    validate: tuple[Part, ...]
    rooflines: tuple[OpCase, ...]
    sustained_s: float
    micro: tuple[MicroPlan, ...]
    tune: TunePlan
    micro_after: tuple[MicroPlan, ...]
    tune_more: TunePlan
    micro_more: tuple[MicroPlan, ...]
    interpret: bool = False


def hopper(validate: tuple[Part, ...], *, device: str = "cuda") -> CampaignPlan:
    """The campaign on one Hopper GPU."""
    ours = kernel_providers("attention")
    # Flex compiles for every shape, for longer than everything else runs: at two lengths.
    quick = tuple(name for name in known_providers() if name not in ("flex", "eager", "compiled", "torch"))
    pointwise = (*kernel_providers("adaln_modulate"), "compiled", "liger")

    def attention(lengths: tuple[int, ...], head_dims: tuple[int, ...], **changes: Any) -> MicroPlan:
        cases = sweep_cases(
            ["attention"], seq_lens=lengths, head_dims=head_dims, num_heads=2, model_heads=16, dtypes=["bf16"]
        )
        return replace(_plan(cases, quick, device), **changes)

    def fused(lengths: tuple[int, ...], ops: tuple[str, ...] = _POINTWISE) -> MicroPlan:
        cases = sweep_cases(ops, seq_lens=lengths, head_dims=[72], num_heads=2, model_heads=16, dtypes=["bf16"])
        return _plan(cases, pointwise, device)

    rivals = (*ours, "sdpa-cudnn", "sdpa-flash")
    # Where a call takes seconds: a backward has its forward run before it, so that both at once cost no more time.
    apart, at_once = ("forward", "backward"), ("forward", "both")
    # Of ours at the longest length: the deterministic form, and the fastest of either direction.
    longest = ("triton", "triton-hopper-atomic", "sdpa-cudnn")
    one = TimingRule(min_samples=2, max_samples=3, budget_s=0.0, wall_cap_s=25.0, warm_up_s=0.0)
    long = {"directions": apart, "rule": one, "case_s": LONG_CASE_S}
    others = sweep_cases(
        ["attention_packed", "attention_clips", "attention_text"],
        seq_lens=[65_536],
        head_dims=[72],
        num_heads=2,
        model_heads=16,
        dtypes=["bf16"],
    )
    tune, tune_more = hopper_plans(device)
    return CampaignPlan(
        device=device,
        validate=validate,
        rooflines=HOPPER.rooflines("bf16"),
        sustained_s=4.0,
        micro=(
            attention((32_768, 131_072), (72,)),
            attention((819_200,), (72,), **long | {"directions": at_once, "providers": longest}),
            fused((131_072,)),
            attention((65_536,), (72,)),
        ),
        tune=tune,
        micro_after=(
            attention((32_768, 65_536), (72,), providers=rivals),
            attention((819_200,), (72,), **long | {"directions": at_once, "providers": longest[:2]}),
            replace(fused((131_072,)), providers=ours[:1]),
        ),
        tune_more=tune_more,
        micro_more=(
            attention((32_768,), (128, 64)),
            attention((4096, 8192, 16_384), (72,)),
            _plan(others, rivals, device),
            fused((131_072,), _FURTHER),
            fused((32_768, 819_200)),
            attention((262_144, 524_288), (72,), providers=(*ours, "sdpa-cudnn"), **long),
            attention((32_768, 131_072), (72,), providers=("flex",)),
            attention((131_072,), (128, 64)),
            attention((131_072,), (72,), providers=rivals),
            attention((819_200,), (72,), **long | {"directions": at_once, "providers": (*longest[:2], "sdpa-flash")}),
            attention((819_200,), (72,), **long | {"directions": ("backward",), "providers": (*ours, "sdpa-cudnn")}),
        ),
    )


def rehearsal(validate: tuple[Part, ...]) -> CampaignPlan:
    """The same path in under a minute on a CPU: tiny sizes, Triton interpreted."""
    rule = TimingRule(min_samples=2, max_samples=2, budget_s=0.0, wall_cap_s=10.0, warm_up_s=0.0)
    providers = ("triton", "eager", "sdpa-flash")
    tiny = {"head_dims": [72], "num_heads": 1, "model_heads": 2, "dtypes": ["fp16"]}
    attention = MicroPlan(
        cases=sweep_cases(ATTENTION_OPS, seq_lens=[48], **tiny),  # type: ignore[arg-type]
        providers=providers,
        directions=("forward", "backward", "both"),
        rule=rule,
        device="cpu",
        label=BEFORE,
        setup_s=_SETUP_S,
    )
    fused = replace(attention, cases=sweep_cases(_ALL_POINTWISE, seq_lens=[6], **tiny), directions=("both",))  # type: ignore[arg-type]
    case = OpCase(op="attention", dtype="fp16", seq_len=48, num_heads=1, head_dim=72)
    rows = OpCase(op="bias_gelu", dtype="fp16", seq_len=6, num_heads=2, head_dim=72)
    tuned: dict[str, Any] = {"device": "cpu", "rule": rule, "final_rule": rule, "most": 1}
    return CampaignPlan(
        device="cpu",
        validate=validate,
        rooflines=tuple(
            OpCase(op=op, dtype="fp16", seq_len=256, num_heads=1, head_dim=256) for op in ("matmul", "clone")
        ),
        sustained_s=0.2,
        micro=(attention, fused),
        tune=TunePlan(
            targets=(*attention_targets(case, ("forward", "dkdv")), *row_targets(rows, ("gelu_fwd",))), **tuned
        ),
        micro_after=(replace(attention, cases=attention.cases[:1]),),
        tune_more=TunePlan(targets=row_targets(rows, ("merge_bwd",)), **tuned),
        micro_more=(replace(fused, cases=fused.cases[-1:]),),
        interpret=True,
    )


def _plan(cases: tuple[OpCase, ...], providers: tuple[str, ...], device: str) -> MicroPlan:
    return MicroPlan(
        cases=cases,
        providers=providers,
        directions=("forward", "backward", "both"),
        rule=_TIMED,
        device=device,
        label=BEFORE,
        setup_s=_SETUP_S,
    )
