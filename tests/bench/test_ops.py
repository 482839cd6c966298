"""Op cases: the work they count, the oracle that holds providers, and providers that are missing."""

from __future__ import annotations

import pytest
import torch

from longreel.bench import op_gate, providers
from longreel.bench.ops import OPS, OpCase, make_inputs, work_of
from longreel.kernels.attention import attention_flops

CPU = torch.device("cpu")
SMALL = {"dtype": "fp32", "num_heads": 4, "head_dim": 8}


def small_case(op: str, seq_len: int = 37, **changes: object) -> OpCase:
    return OpCase(**({"op": op, "seq_len": seq_len} | SMALL | changes))


@pytest.mark.parametrize("op", OPS)
def test_gate_passes_what_is_right(op, monkeypatch):
    # Several blocks of tokens, the last one short.
    monkeypatch.setattr(op_gate, "_BLOCK_ELEMENTS", 4096)
    case = small_case(op, batch=2)
    for provider in {*providers.providers_of(op)} & {"eager", "sdpa-flash"} | (
        {"torch"} if OPS[op].differentiable else set()
    ):
        function = providers.build(case, provider, CPU)
        verdict = op_gate.check(case, function, make_inputs(case, CPU), is_ours=False)
        assert verdict.reason is None, provider
        inputs = 3 if op.startswith("attention") else len(OPS[op].shapes(case))
        num_grads = inputs if OPS[op].differentiable else 0
        assert sum(name.startswith("d") for name in verdict.error) == num_grads


@pytest.mark.parametrize("op", OPS)
def test_gate_catches_a_wrong_output(op):
    case = small_case(op)
    plain = OPS[op].plain(case)

    def wrong(*inputs):
        first, *others = plain(*inputs)
        return first + 0.01 * first.detach().abs().mean(), *others

    reason = op_gate.check(case, wrong, make_inputs(case, CPU), is_ours=False).reason
    assert reason.startswith("out is off by")


@pytest.mark.parametrize("op", [op for op in OPS if OPS[op].differentiable])
def test_gate_catches_each_wrong_gradient(op):
    case = small_case(op)
    plain = OPS[op].plain(case)
    for name in OPS[op].shapes(case):

        def wrong(*inputs, name=name):
            scaled = dict(zip(OPS[op].shapes(case), inputs, strict=True))
            # Forward as it is, this input's gradient 1 % too large.
            scaled[name] = scaled[name] + 0.01 * (scaled[name] - scaled[name].detach())
            return plain(*scaled.values())

        verdict = op_gate.check(case, wrong, make_inputs(case, CPU), is_ours=True)
        wrong_names = [n for n in verdict.error if verdict.error[n] > verdict.allowed[n]]
        expected = ["dq", "dk", "dv"] if op == "attention_packed" else [f"d{name}"]
        assert wrong_names == expected


def test_long_attention_is_held_at_chosen_rows(monkeypatch):
    monkeypatch.setattr(op_gate, "MAX_FULL_ROWS", 16)
    monkeypatch.setattr(op_gate, "NUM_ROWS", 8)
    case = small_case("attention", seq_len=200)
    rows = op_gate._chosen_rows(200, CPU)
    assert len(rows) == len(set(rows.tolist())) == 8
    assert (rows[0], rows[-1]) == (0, 199)
    plain = OPS["attention"].plain(case)
    inputs = make_inputs(case, CPU)
    assert op_gate.check(case, plain, inputs, is_ours=True).reason is None

    def unwritten(q, k, v):
        (out,) = plain(q, k, v)
        mask = torch.ones_like(out)
        # A row that is not among those compared.
        mask[:, next(i for i in range(200) if i not in rows)] = float("nan")
        return (out * mask,)

    assert op_gate.check(case, unwritten, inputs, is_ours=True).error["out"] == float("inf")

    def forgets_keys(q, k, v):
        return plain(q, k[:, :150], v[:, :150])

    error = op_gate.check(case, forgets_keys, inputs, is_ours=True).error
    assert all(error[name] > 0.01 for name in ("out", "dq", "dk", "dv"))


def test_work_is_counted_from_shapes():
    case = OpCase(op="attention", dtype="bf16", seq_len=1000, num_heads=2, head_dim=72)
    shape = (1, 1000, 2, 72)
    assert work_of(case, "forward") == {"flops": attention_flops(shape, shape), "bytes_moved": None}
    assert work_of(case, "both")["flops"] == attention_flops(shape, shape, products=7)
    rows = OpCase(op="adaln_modulate", dtype="bf16", seq_len=1000, num_heads=16, head_dim=72)
    assert work_of(rows, "forward")["bytes_moved"] == 2 * 1000 * 1152 * 2
    assert work_of(rows, "backward")["bytes_moved"] == 3 * 1000 * 1152 * 2
    wide = OpCase(op="bias_gelu", dtype="fp32", seq_len=1000, num_heads=16, head_dim=72)
    assert work_of(wide, "forward")["bytes_moved"] == 2 * 1000 * 4608 * 4


@pytest.mark.parametrize("op", OPS)
def test_inputs_have_the_shapes_and_are_never_zero(op):
    case = small_case(op)
    inputs = make_inputs(case, CPU)
    assert {name: tuple(t.shape) for name, t in inputs.items()} == OPS[op].shapes(case)
    assert all(t.any() and t.requires_grad == OPS[op].differentiable for t in inputs.values())
    again = make_inputs(case, CPU)
    assert all(torch.equal(a, b) for a, b in zip(inputs.values(), again.values(), strict=True))


@pytest.mark.parametrize(
    ("op", "provider", "reason"),
    [
        ("attention", "triton", "needs a CUDA device, got tensors on cpu"),
        ("attention", "sdpa-cudnn", "sdpa-cudnn needs a CUDA device"),
        ("attention_packed", "flash-attn-4", "flash-attn-4 needs a CUDA device"),
        ("adaln_modulate", "liger", "liger needs a CUDA device"),
        ("bias_gelu", "liger", "there is no liger for bias_gelu"),
        ("bias_gelu", "flex", "there is no flex for bias_gelu"),
    ],
)
def test_a_missing_provider_says_why(op, provider, reason):
    with pytest.raises(providers.Unavailable, match=reason):
        providers.build(small_case(op), provider, CPU)


def test_peers_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(providers.Unavailable, match=r"flash-attn-2 is not installed \(package flash-attn\)"):
        providers.build(small_case("attention"), "flash-attn-2", torch.device("cuda"))


def test_eager_attention_is_not_tried_where_its_scores_do_not_fit():
    with pytest.raises(providers.Unavailable, match="its scores alone take 5,000 GiB"):
        providers.build(small_case("attention", seq_len=819_200, dtype="bf16"), "compiled", CPU)


def test_kernels_of_this_project_come_from_its_own_lists(monkeypatch):
    monkeypatch.setattr(providers, "ATTENTION_PROVIDERS", ("torch", "sdpa-flash", "triton", "triton-next"))
    assert providers.kernel_providers("attention") == ("triton", "triton-next")
    assert providers.providers_of("attention")[:3] == ("triton", "triton-next", "eager")
    assert providers.kernel_providers("clone") == ()


def test_a_kernel_taken_over_from_another_provider_is_really_the_other_s():
    pytest.importorskip("triton")
    from longreel.kernels import triton_attention, triton_attention_atomic, triton_attention_hopper

    assert triton_attention_atomic.attention_fwd is triton_attention.attention_fwd
    assert triton_attention_hopper.attention_bwd is triton_attention.attention_bwd
    assert providers.same_as("triton-atomic", "forward") == providers.same_as("triton-hopper", "backward") == "triton"
    assert providers.same_as("triton", "forward") is None
