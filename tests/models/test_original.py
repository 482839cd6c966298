"""models/original.py, with Hugging Face diffusers' DiT as the outside witness of the original model."""

from __future__ import annotations

import copy

import pytest
import torch

from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.models.flow import TIMESTEP_SCALE
from longreel.models.original import export_original, import_original, original_keys
from longreel.models.patches import grid_coords, patchify, unpatchify
from longreel.models.sequence import SequenceLengths

CONFIG = DiTConfig(
    depth=3,
    hidden_size=96,
    num_heads=2,
    in_channels=4,
    learn_sigma=True,
    num_classes=10,
    position="2d",
)
GRID_SIZE = 7


def build_diffusers(seed: int):
    """diffusers' model, set up to be the original DiT, every parameter random (gates and last layers too)."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_dim,
        in_channels=CONFIG.in_channels,
        out_channels=CONFIG.out_channels,
        num_layers=CONFIG.depth,
        sample_size=2 * GRID_SIZE,
        patch_size=2,
        num_embeds_ada_norm=CONFIG.num_classes,
        norm_eps=1e-6,
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if name.endswith("bias") or "embedding" in name else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    shared = model.transformer_blocks[0].norm1.emb
    shared.time_proj.downscale_freq_shift = 0
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = copy.deepcopy(shared)
    return model


def original_from_diffusers(model) -> dict[str, torch.Tensor]:
    """The same weights in the original release's layout."""
    theirs = model.state_dict()
    state = {"pos_embed": model.pos_embed.pos_embed.reshape(1, GRID_SIZE**2, -1)}

    def copy_layer(ours: str, *names: str) -> None:
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = torch.cat([theirs[f"{name}.{kind}"] for name in names])

    copy_layer("x_embedder.proj", "pos_embed.proj")
    embedder = "transformer_blocks.0.norm1.emb"
    copy_layer("t_embedder.mlp.0", f"{embedder}.timestep_embedder.linear_1")
    copy_layer("t_embedder.mlp.2", f"{embedder}.timestep_embedder.linear_2")
    state["y_embedder.embedding_table.weight"] = theirs[f"{embedder}.class_embedder.embedding_table.weight"]
    for i in range(CONFIG.depth):
        block = f"transformer_blocks.{i}"
        copy_layer(f"blocks.{i}.adaLN_modulation.1", f"{block}.norm1.linear")
        copy_layer(f"blocks.{i}.attn.qkv", *(f"{block}.attn1.to_{name}" for name in "qkv"))
        copy_layer(f"blocks.{i}.attn.proj", f"{block}.attn1.to_out.0")
        copy_layer(f"blocks.{i}.mlp.fc1", f"{block}.ff.net.0.proj")
        copy_layer(f"blocks.{i}.mlp.fc2", f"{block}.ff.net.2")
    copy_layer("final_layer.adaLN_modulation.1", "proj_out_1")
    copy_layer("final_layer.linear", "proj_out_2")
    return state


@pytest.mark.parametrize("seed", [0, 1])
def test_output_equals_diffusers_with_the_same_random_weights(local_sp, seed):
    witness = build_diffusers(seed)
    model = DiT(CONFIG)
    model.load_state_dict(import_original(original_from_diffusers(witness), CONFIG))

    generator = torch.Generator().manual_seed(100 + seed)
    latents = torch.randn(3, CONFIG.in_channels, 2 * GRID_SIZE, 2 * GRID_SIZE, generator=generator)
    timestep, labels = torch.tensor([0, 417, 999]), torch.tensor([0, 7, CONFIG.num_classes])
    grid, num_tokens = (1, GRID_SIZE, GRID_SIZE), GRID_SIZE**2
    with torch.no_grad():
        expected = witness(latents, timestep, labels).sample
        tokens = model(
            patchify(latents.permute(0, 2, 3, 1).unsqueeze(1), CONFIG.patch_size),
            grid_coords(grid, 0, num_tokens),
            timestep.float(),
            labels=labels,
            sp=local_sp,
            lengths=SequenceLengths(valid=num_tokens, padded=num_tokens),
        )
    ours = unpatchify(tokens, grid, CONFIG.patch_size, CONFIG.out_channels).squeeze(1).permute(0, 3, 1, 2)
    assert expected.shape == ours.shape == (3, 8, 14, 14)
    assert expected.std() > 0.1
    error = (ours - expected).norm() / expected.norm()
    assert error < 1e-5, f"relative error {error:.3g}"
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def make_state() -> tuple[DiT, dict[str, torch.Tensor]]:
    model = DiT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, export_original(model.state_dict(), CONFIG, grid_size=GRID_SIZE)


def test_export_and_import_are_inverse():
    model, state = make_state()
    back = import_original(state, CONFIG)
    assert back.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(back[name], value), name
    again = export_original(back, CONFIG, grid_size=GRID_SIZE)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_layout_is_that_of_the_release():
    _, state = make_state()
    shapes = {
        name: tuple(value.shape) for name, value in state.items() if not name.startswith(("blocks.1", "blocks.2"))
    }
    assert shapes == {
        "pos_embed": (1, 49, 96),
        "x_embedder.proj.weight": (96, 4, 2, 2),
        "x_embedder.proj.bias": (96,),
        "t_embedder.mlp.0.weight": (96, 256),
        "t_embedder.mlp.0.bias": (96,),
        "t_embedder.mlp.2.weight": (96, 96),
        "t_embedder.mlp.2.bias": (96,),
        "y_embedder.embedding_table.weight": (11, 96),
        "blocks.0.attn.qkv.weight": (288, 96),
        "blocks.0.attn.qkv.bias": (288,),
        "blocks.0.attn.proj.weight": (96, 96),
        "blocks.0.attn.proj.bias": (96,),
        "blocks.0.mlp.fc1.weight": (384, 96),
        "blocks.0.mlp.fc1.bias": (384,),
        "blocks.0.mlp.fc2.weight": (96, 384),
        "blocks.0.mlp.fc2.bias": (96,),
        "blocks.0.adaLN_modulation.1.weight": (576, 96),
        "blocks.0.adaLN_modulation.1.bias": (576,),
        "final_layer.linear.weight": (32, 96),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (192, 96),
        "final_layer.adaLN_modulation.1.bias": (192,),
    }


def test_position_embedding_may_be_left_out_but_not_be_another():
    _, state = make_state()
    without = {name: value for name, value in state.items() if name != "pos_embed"}
    assert import_original(without, CONFIG).keys() == import_original(state, CONFIG).keys()
    with pytest.raises(ValueError, match="pos_embed differs by"):
        import_original(state | {"pos_embed": state["pos_embed"].flip(1)}, CONFIG)
    with pytest.raises(ValueError, match="square number"):
        import_original(state | {"pos_embed": state["pos_embed"][:, :-1]}, CONFIG)


def test_half_precision_checkpoints_load():
    _, state = make_state()
    assert import_original({name: value.half() for name, value in state.items()}, CONFIG)


def test_missing_and_unexpected_keys_and_wrong_shapes_are_listed():
    _, state = make_state()
    wrong_keys = {("renamed" if name == "x_embedder.proj.bias" else name): value for name, value in state.items()}
    with pytest.raises(ValueError, match=r"missing keys x_embedder\.proj\.bias; unexpected keys renamed"):
        import_original(wrong_keys, CONFIG)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.weight is \[96, 96\], expected \[288, 96\]"):
        import_original(state | {"blocks.1.attn.qkv.weight": torch.zeros(96, 96)}, CONFIG)
    # Same number of elements as the convolution, another layout.
    with pytest.raises(ValueError, match=r"expected \[96, 4, 2, 2\]"):
        import_original(state | {"x_embedder.proj.weight": torch.zeros(96, 2, 2, 4)}, CONFIG)
    with pytest.raises(ValueError, match="not a state dict of this configuration"):
        export_original(state, CONFIG, grid_size=GRID_SIZE)
    with pytest.raises(ValueError, match="grid_size"):
        export_original({}, CONFIG, grid_size=0)


def test_configurations_of_another_form_are_named():
    video = DiTConfig(depth=1, hidden_size=48, num_heads=3, patch_size=(2, 2, 2), conditioning="cross")
    with pytest.raises(ValueError, match=r"num_classes = 0.*'cross'.*'3d'.*\(2, 2, 2\)"):
        original_keys(video)


def test_timestep_scale_is_the_range_the_original_was_trained_on():
    assert TIMESTEP_SCALE == 1000
