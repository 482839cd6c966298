"""Op cases: the work they count, the oracle that holds providers, and providers that are missing."""

from __future__ import annotations

import importlib

import pytest
import torch

from longreel.bench import op_gate, providers
from longreel.bench.micro_sweep import sweep_cases
from longreel.bench.ops import ATTENTION_OPS, OPS, TEXT_TOKENS, OpCase, make_inputs, work_of
from longreel.bench.plain_ops import FRAME_TOKENS, clip_bounds
from longreel.kernels import attention
from longreel.kernels.attention import attention_flops
from longreel.kernels.numerics import relative_error

CPU = torch.device("cpu")
SMALL = {"dtype": "fp32", "num_heads": 4, "head_dim": 8}


def small_case(op: str, seq_len: int = 37, **changes: object) -> OpCase:
    return OpCase(**({"op": op, "seq_len": seq_len} | SMALL | changes))


@pytest.mark.parametrize("op", OPS)
def test_gate_passes_what_is_right(op, monkeypatch):
    # Several blocks of tokens, the last one short.
    monkeypatch.setattr(op_gate, "_BLOCK_ELEMENTS", 4096)
    case = small_case(op, batch=1 if OPS[op].packs else 2)
    if OPS[op].unit > 1:
        # Whole frames and a short one.
        case = small_case(op, seq_len=2 * FRAME_TOKENS + 37)
    for provider in {*providers.providers_of(op)} & {"eager", "sdpa-flash"} | (
        {"torch"} if OPS[op].differentiable else set()
    ):
        function = providers.build(case, provider, CPU)
        verdict = op_gate.check(case, function, make_inputs(case, CPU), is_ours=False)
        assert verdict.reason is None, provider
        inputs = 3 if op.startswith("attention") else len(OPS[op].shapes(case))
        num_grads = inputs if OPS[op].differentiable else 0
        assert sum(name.startswith("d") for name in verdict.error) == num_grads


@pytest.mark.parametrize("op", ATTENTION_OPS)
@pytest.mark.parametrize("seq_len", [37, 300], ids=["every-row", "chosen-rows"])
def test_gate_holds_the_lse_that_attention_returns(op, seq_len, monkeypatch):
    monkeypatch.setattr(op_gate, "MAX_FULL_ROWS", 64)
    monkeypatch.setattr(op_gate, "NUM_ROWS", 16)
    case = small_case(op, seq_len=seq_len)
    right, inputs = providers.build(case, "torch", CPU), make_inputs(case, CPU)

    def check(change_lse):
        def function(*leaves):
            out, lse = right(*leaves)
            return out, change_lse(lse)

        verdict = op_gate.check(case, function, inputs, is_ours=True)
        return {name for name, error in verdict.error.items() if not error <= verdict.allowed[name]}

    assert check(lambda lse: lse) == set()
    assert check(lambda lse: torch.full_like(lse, 12345.0, requires_grad=True) + 0 * lse) >= {"lse"}
    assert check(lambda lse: lse + 1e-4) == {"lse"}
    # Right to look at, with a gradient that is 1 % too large, or missing.
    assert check(lambda lse: lse + 0.01 * (lse - lse.detach())) == {"dq", "dk"}
    assert check(lambda lse: lse.detach() + 0 * lse) == {"dq", "dk"}

    def unwritten(lse):
        mask = torch.ones_like(lse)
        mask[..., next(i for i in range(1, seq_len) if i not in op_gate._chosen_rows(seq_len, CPU))] = float("nan")
        return lse * mask

    if seq_len > 64:
        assert "lse" in check(unwritten)


@pytest.mark.parametrize("longest", [64, 16], ids=["alone-too", "together"])
def test_a_backward_that_is_wrong_without_a_gradient_of_lse_is_caught_where_it_is_run(longest, monkeypatch):
    monkeypatch.setattr(op_gate, "MAX_ALONE", longest)
    case = small_case("attention", seq_len=37)
    right, inputs = providers.build(case, "torch", CPU), make_inputs(case, CPU)
    ran = []

    class Forgets(torch.autograd.Function):
        """Right with a gradient of lse, 1 % off without."""

        @staticmethod
        def forward(ctx, out, lse):
            ctx.set_materialize_grads(False)
            return out.clone(), lse.clone()

        @staticmethod
        def backward(ctx, dout, dlse):
            ran.append(dlse is not None)
            return dout if dlse is not None else 1.01 * dout, dlse

    verdict = op_gate.check(case, lambda *qkv: Forgets.apply(*right(*qkv)), inputs, is_ours=True)
    assert ran == ([False, True] if longest == 64 else [True])
    assert (verdict.reason is None) == (longest == 16)


class Shifted(torch.autograd.Function):
    """Its input, with something added to the gradient."""

    @staticmethod
    def forward(ctx, x, delta):
        ctx.delta = delta
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + ctx.delta, None


# The bar in numbers of its own: twice eager's error, and of eps two in attention, one elsewhere; peers four times that.
@pytest.mark.parametrize(("is_ours", "slack"), [(True, 1.0), (False, 4.0)], ids=["ours", "peer"])
@pytest.mark.parametrize(("op", "floor", "shared"), [("attention", 2.0, "v"), ("bias_gelu", 1.0, "x")])
def test_gate_opens_just_inside_its_bar_and_not_just_outside(op, floor, shared, is_ours, slack):
    case = small_case(op)
    plain, inputs = OPS[op].plain(case), make_inputs(case, CPU)

    def run(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs.values()]
        (out,) = plain(*leaves)
        (dout,) = op_gate.incoming([out.float()])
        return out.detach(), torch.autograd.grad(out, leaves, dout.to(dtype))[list(inputs).index(shared)]

    exact, eager = run(torch.float64), run(torch.float32)
    bars = [slack * (2 * relative_error(e, x) + floor * 2**-23) for e, x in zip(eager, exact, strict=True)]
    for i, name in enumerate(("out", f"d{shared}")):
        for part, passes in ((0.9, True), (1.1, False)):
            noise = torch.randn(exact[i].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            delta = part * bars[i] * exact[i].norm() * noise / noise.norm()

            def off(*leaves, i=i, delta=delta):
                # In fp64, so that what is added is all of the error.
                wide = {n: t.double() for n, t in zip(inputs, leaves, strict=True)}
                if i:
                    wide[shared] = Shifted.apply(wide[shared], delta)
                out = plain(*wide.values())[0]
                return ((out if i else out + delta).float(),)

            verdict = op_gate.check(case, off, inputs, is_ours=is_ours)
            assert (verdict.error[name] <= verdict.allowed[name]) == passes, (name, part)
            assert (verdict.reason is None) == passes


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


def test_clips_do_not_see_each_other():
    case = small_case("attention_clips", seq_len=50)
    q, k, v = make_inputs(case, CPU).values()
    (out,) = OPS["attention_clips"].plain(case)(q, k, v)
    bounds = torch.tensor(clip_bounds(50))
    torch.testing.assert_close(out, attention(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds)[0])
    whole = op_gate.check(case, lambda *qkv: attention(*qkv), {"q": q, "k": k, "v": v}, is_ours=False)
    assert whole.reason is not None


def test_layout_changes_of_tokens_are_measured_where_they_move_something():
    ops = ["sp_pack_tokens", "sp_unpack_tokens", "adaln_frames", "attention_clips", "bias_gelu"]
    cases = sweep_cases(ops, seq_lens=[64], head_dims=[8], num_heads=2, model_heads=4, dtypes=["fp32"])
    assert [case.batch for case in cases] == [2, 2, 1, 1, 1]
    for case in cases[:2]:
        inputs = make_inputs(case, CPU)
        (out,) = providers.build(case, "torch", CPU)(*inputs.values())
        assert out.untyped_storage().data_ptr() != next(iter(inputs.values())).untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="adaln_frames is about one packed sequence: batch must be 1, got 2"):
        small_case("adaln_frames", batch=2)


def test_work_is_counted_from_shapes():
    case = OpCase(op="attention", dtype="bf16", seq_len=1000, num_heads=2, head_dim=72)
    shape = (1, 1000, 2, 72)
    assert work_of(case, "forward") == {"flops": attention_flops(shape, shape), "bytes_moved": None}
    assert work_of(case, "both")["flops"] == attention_flops(shape, shape, products=7)
    rows = OpCase(op="adaln_modulate", dtype="bf16", seq_len=1000, num_heads=16, head_dim=72)
    assert work_of(rows, "forward")["bytes_moved"] == 2 * 1000 * 1152 * 2
    assert work_of(rows, "backward")["bytes_moved"] == 3 * 1000 * 1152 * 2
    clips = OpCase(op="attention_clips", dtype="bf16", seq_len=1000, num_heads=2, head_dim=72)
    pairs = 142**2 + 358**2 + 300**2 + 200**2
    assert work_of(clips, "forward")["flops"] == 4 * 2 * pairs * 72
    text = OpCase(op="attention_text", dtype="bf16", seq_len=1000, num_heads=2, head_dim=72)
    assert work_of(text, "backward")["flops"] == attention_flops(shape, (1, TEXT_TOKENS, 2, 72), products=5)
    assert text.shape()["kv_len"] == TEXT_TOKENS
    # One rank of eight has two of sixteen heads, of q, k and v: read and written.
    tokens = OpCase(op="sp_unpack_tokens", dtype="bf16", seq_len=1000, num_heads=16, head_dim=72, batch=2)
    assert work_of(tokens, "forward")["bytes_moved"] == 2 * (2 * 1000 * 3 * 2 * 72) * 2
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


def test_the_fastest_forward_and_backward_together_are_those_of_two_providers():
    pytest.importorskip("triton")
    assert "triton-hopper-atomic" in providers.kernel_providers("attention")
    from longreel.kernels import triton_attention_atomic, triton_attention_hopper, triton_attention_hopper_atomic

    # `longreel.kernels.attention` is the function.
    attention_module = importlib.import_module("longreel.kernels.attention")
    assert triton_attention_hopper_atomic.attention_fwd is triton_attention_hopper.attention_fwd
    assert triton_attention_hopper_atomic.attention_bwd is triton_attention_atomic.attention_bwd
    assert attention_module._implementation("triton-hopper-atomic") is triton_attention_hopper_atomic
    with pytest.raises(providers.Unavailable, match="provider 'triton-hopper-atomic' needs a CUDA device, a Hopper"):
        providers.build(small_case("attention"), "triton-hopper-atomic", CPU)
    assert providers.same_as("triton-hopper-atomic", "forward") == "triton-hopper"
    assert providers.same_as("triton-hopper-atomic", "backward") == "triton-atomic"
    # Both at once are its own.
    assert providers.same_as("triton-hopper-atomic", "both") is None
