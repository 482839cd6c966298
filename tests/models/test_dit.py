"""models/dit.py: every conditioning runs, depends on what conditions it, and has finite, non-zero gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from longreel.models.config import DiTConfig, dit_xl_2
from longreel.models.dit import DiT, parameter_count
from longreel.models.embeddings import position_embedding
from longreel.models.sequence import SequenceLengths

GRID = (3, 5, 2)
NUM_VIDEO = 30
NUM_TEXT = 7
BATCH = 2

CASES = {
    "adaln": {"conditioning": "adaln"},
    "cross": {"conditioning": "cross"},
    "cross-published": {"conditioning": "cross", "cross_layout": "published"},
    "text-only": {"conditioning": "cross", "text_only": True},
    "text-only-published": {"conditioning": "cross", "text_only": True, "cross_layout": "published"},
    "in-context": {"conditioning": "in_context"},
    "classes": {"num_classes": 4},
    "classes-cross": {"num_classes": 4, "conditioning": "cross"},
}
WITH_TEXT = [name for name in CASES if name != "classes"]


def coords_of(grid: tuple[int, int, int]) -> torch.Tensor:
    axes = [torch.arange(n, dtype=torch.float64) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def inputs_of(model: DiT, *, pad: int = 0, seed: int = 1) -> dict:
    """Arguments of forward for one sample batch on one device, `pad` rows of padding at the end."""
    g = torch.Generator().manual_seed(seed)
    config = model.config
    num_text = NUM_TEXT if config.conditioning == "in_context" else 0
    valid = NUM_VIDEO + num_text
    has_text = config.conditioning != "adaln" or not config.num_classes
    return {
        "tokens": torch.randn(BATCH, NUM_VIDEO + pad, config.patch_dim, generator=g, dtype=torch.float64),
        "coords": torch.cat([coords_of(GRID), torch.full((pad, 3), 3.0, dtype=torch.float64)]),
        "timestep": torch.tensor([999.0, 3.5], dtype=torch.float64),
        "text": torch.randn(BATCH, NUM_TEXT, config.text_dim, generator=g, dtype=torch.float64) if has_text else None,
        "labels": torch.tensor([1, config.num_classes]) if config.num_classes else None,
        "lengths": SequenceLengths(valid=valid, padded=valid + pad),
        "text_lengths": SequenceLengths(valid=NUM_TEXT, padded=NUM_TEXT)
        if config.cross_layout == "published"
        else None,
    }


def run(model: DiT, sp, inputs: dict) -> torch.Tensor:
    rest = {k: v for k, v in inputs.items() if k not in ("tokens", "coords", "timestep")}
    return model(inputs["tokens"], inputs["coords"], inputs["timestep"], sp=sp, **rest)


@pytest.mark.parametrize("case", CASES)
def test_output_shape_and_every_gradient(make_model, local_sp, case):
    model = make_model(**CASES[case])
    inputs = inputs_of(model)
    inputs["tokens"].requires_grad_()
    out = run(model, local_sp, inputs)
    assert out.shape == (BATCH, NUM_VIDEO, model.config.patch_dim)
    out.square().sum().backward()
    assert inputs["tokens"].grad.isfinite().all()
    assert inputs["tokens"].grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} is not used"
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, f"{name} has a zero gradient"


@pytest.mark.parametrize(
    ("case", "per_block"),
    [
        ("adaln", ["self_attention"]),
        ("in-context", ["self_attention"]),
        ("cross", ["self_attention"]),
        ("cross-published", ["self_attention", "cross_attention"]),
        ("text-only", []),
        ("text-only-published", ["cross_attention"]),
    ],
)
def test_strategy_is_asked_for_exactly_these_attentions(make_model, local_sp, case, per_block):
    model = make_model(**CASES[case])
    run(model, local_sp, inputs_of(model))
    assert local_sp.calls == per_block * model.config.depth


@pytest.mark.parametrize("case", WITH_TEXT)
def test_output_depends_on_text_of_its_own_sample_only(make_model, local_sp, case):
    model = make_model(**CASES[case])
    inputs = inputs_of(model)
    out = run(model, local_sp, inputs)
    changed = dict(inputs, text=inputs["text"].clone())
    changed["text"][0] += 1.0
    difference = (run(model, local_sp, changed) - out).abs().amax(dim=(1, 2))
    assert difference[0] > 1e-4
    assert difference[1] == 0


@pytest.mark.parametrize("case", CASES)
def test_output_depends_on_timestep_and_position(make_model, local_sp, case):
    model = make_model(**CASES[case])
    inputs = inputs_of(model)
    out = run(model, local_sp, inputs)
    other_time = run(model, local_sp, dict(inputs, timestep=torch.tensor([998.0, 3.5], dtype=torch.float64)))
    assert (other_time[0] - out[0]).abs().max() > 1e-6
    assert torch.equal(other_time[1], out[1])
    moved = run(model, local_sp, dict(inputs, coords=inputs["coords"] + torch.tensor([1.0, 0.0, 0.0])))
    assert (moved - out).abs().max() > 1e-4


def test_positions_are_scaled_by_their_gain(make_model, local_sp):
    """All rows at one place, the embedding is a constant, which the patch embedding's bias may hold as well."""
    plain, scaled = make_model(), make_model(position_gain=4.0)
    scaled.load_state_dict(plain.state_dict())
    inputs = inputs_of(plain)
    inputs["coords"] = inputs["coords"][17:18].expand(NUM_VIDEO, 3)
    there = position_embedding(inputs["coords"][:1], plain.config.hidden_size, "3d", torch.float64)[0]
    with torch.no_grad():
        plain.patch_embed.bias += 3 * there
    torch.testing.assert_close(run(scaled, local_sp, inputs), run(plain, local_sp, inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gain", [0.0, float("inf"), float("nan")])
def test_a_gain_that_leaves_no_positions_is_an_error(make_model, gain):
    with pytest.raises(ValueError, match="position_gain must be positive and finite"):
        make_model(position_gain=gain)


def test_output_depends_on_the_label(make_model, local_sp):
    model = make_model(num_classes=4)
    inputs = inputs_of(model)
    difference = run(model, local_sp, dict(inputs, labels=torch.tensor([2, 4]))) - run(model, local_sp, inputs)
    assert difference[0].abs().max() > 1e-5
    assert difference[1].abs().max() == 0


@pytest.mark.parametrize("case", CASES)
def test_padding_rows_change_nothing(make_model, local_sp, case):
    model = make_model(**CASES[case])
    plain, padded = inputs_of(model), inputs_of(model, pad=3)
    padded["tokens"][:, :NUM_VIDEO] = plain["tokens"]
    padded["text"] = plain["text"]
    out = run(model, local_sp, padded)
    torch.testing.assert_close(out[:, :NUM_VIDEO], run(model, local_sp, plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["cross", "text-only"])
def test_both_cross_layouts_compute_the_same(make_model, local_sp, case):
    model = make_model(**CASES[case])
    other = make_model(**(CASES[case] | {"cross_layout": "published"}))
    other.load_state_dict(model.state_dict())
    ours, theirs = inputs_of(model), inputs_of(other)
    torch.testing.assert_close(run(model, local_sp, ours), run(other, local_sp, theirs), rtol=0, atol=1e-12)


class OneRankOfRecorded:
    """One rank's rows of a recorded whole-sequence run: checks its rows and returns their part of the attention."""

    provider, degree = "torch", 2

    def __init__(self, local_sp, recorded, start):
        self.local_sp, self.recorded, self.start = local_sp, list(recorded), start

    def self_attention(self, x, qkv, *, num_heads, lengths):
        rows = slice(self.start, self.start + x.shape[1])
        whole = self.recorded.pop(0)
        torch.testing.assert_close(x, whole[:, rows], rtol=0, atol=1e-12)
        whole = torch.cat([whole[:, : rows.start], x, whole[:, rows.stop :]], dim=1)
        return self.local_sp.self_attention(whole, qkv, num_heads=num_heads, lengths=lengths)[:, rows]


@pytest.mark.parametrize("first_rank_rows", [4, NUM_TEXT, 20], ids=["text-cut", "no-text-or-no-video", "video-cut"])
def test_in_context_rows_of_each_rank_equal_the_whole_sequence(make_model, local_sp, first_rank_rows):
    model = make_model(conditioning="in_context")
    inputs = inputs_of(model)
    seen: list[torch.Tensor] = []
    original = local_sp.self_attention

    def record(x, qkv, **kwargs):
        seen.append(x.detach())
        return original(x, qkv, **kwargs)

    local_sp.self_attention = record
    whole = run(model, local_sp, inputs)
    local_sp.self_attention = original

    cut_text = min(first_rank_rows, NUM_TEXT)
    cut_video = max(0, first_rank_rows - NUM_TEXT)
    outs = []
    for start, text, video in (
        (0, slice(0, cut_text), slice(0, cut_video)),
        (first_rank_rows, slice(cut_text, None), slice(cut_video, None)),
    ):
        local = dict(
            inputs, tokens=inputs["tokens"][:, video], coords=inputs["coords"][video], text=inputs["text"][:, text]
        )
        local["tokens"] = local["tokens"].clone().requires_grad_()
        outs.append(run(model, OneRankOfRecorded(local_sp, seen, start), local))
        model.zero_grad()
        outs[-1].sum().backward()
        # Every rank takes part in every gradient reduction, with zeros where it holds no rows.
        assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=0, atol=1e-12)


def test_half_precision_weights_embed_timestep_in_fp32(make_model, local_sp):
    model = make_model(dtype=torch.bfloat16)
    reference = copy.deepcopy(model).float()
    inputs = inputs_of(model)
    seen = []
    model.time_embed.fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    reference.time_embed.fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    out = run(model, local_sp, inputs)
    expected = run(reference, local_sp, inputs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(seen[0], seen[1].bfloat16())
    rounded = seen[1].new_tensor([999.0]).bfloat16().float()
    assert rounded.item() == 1000.0
    assert (out.float() - expected).norm() < 0.02 * expected.norm()


def test_initialisation_is_deterministic_and_predicts_zero(local_sp):
    config = DiTConfig(depth=2, hidden_size=48, num_heads=3, conditioning="cross")
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(DiT(config))
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    block = models[0].blocks[0]
    for zero in (block.modulation.weight, block.cross.proj.weight, models[0].final.proj.weight, block.qkv.bias):
        assert not zero.any()
    bound = (6 / (48 + 3 * 48)) ** 0.5
    assert 0.95 * bound < block.qkv.weight.abs().max() <= bound
    assert 0.018 < models[0].time_embed.fc1.weight.std() < 0.022
    tokens = torch.randn(1, 4, config.patch_dim)
    coords = coords_of((1, 2, 2)).float()
    out = models[0](
        tokens,
        coords,
        torch.tensor([3.0]),
        text=torch.randn(1, 5, 256),
        sp=local_sp,
        lengths=SequenceLengths(valid=4, padded=4),
    )
    assert torch.equal(out, torch.zeros(1, 4, config.patch_dim))


def test_parameter_count_of_the_original_xl_2():
    config = dit_xl_2(num_classes=1000, learn_sigma=True, position="2d")
    assert parameter_count(config, frozen_position_tokens=256) == 675_129_632


def test_text_only_has_no_self_attention_parameters():
    full = dit_xl_2(conditioning="cross")
    text_only = dit_xl_2(conditioning="cross", text_only=True)
    self_attention = 28 * (4 * 1152 * 1152 + 4 * 1152)
    assert parameter_count(full) - parameter_count(text_only) == self_attention


@pytest.mark.parametrize("conditioning", ["adaln", "in_context"])
def test_text_only_without_cross_attention_is_an_error(conditioning):
    with pytest.raises(ValueError, match="nothing would attend"):
        DiTConfig(depth=1, hidden_size=48, num_heads=3, text_only=True, conditioning=conditioning)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("adaln", {"text": None}, "text is missing"),
        ("cross", {"text": None}, "text is missing"),
        ("classes", {"text": torch.zeros(2, 7, 20)}, "takes no text"),
        ("classes", {"labels": None}, "labels are missing"),
        ("adaln", {"labels": torch.zeros(2, dtype=torch.int64)}, "labels are given"),
        ("adaln", {"text": torch.zeros(2, 7, 21)}, "text_dim = 20"),
        ("adaln", {"tokens": torch.zeros(2, 30, 13)}, "patch_dim = 12"),
        ("adaln", {"coords": torch.zeros(29, 3)}, "one row per token"),
        ("adaln", {"timestep": torch.zeros(3)}, "timestep must be"),
        ("adaln", {"timestep": torch.zeros(2, dtype=torch.bfloat16)}, "half precision"),
        ("cross-published", {"text_lengths": None}, "text_lengths"),
    ],
)
def test_wrong_inputs_are_named(make_model, local_sp, case, change, message):
    model = make_model(**CASES[case])
    with pytest.raises(ValueError, match=message):
        run(model, local_sp, inputs_of(model) | change)
