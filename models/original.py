"""The checkpoint layout of the original DiT release, to our parameter names and back.

| original                                    | ours                              |
| ------------------------------------------- | --------------------------------- |
| x_embedder.proj.weight [C, c, p, p]         | patch_embed.weight [C, p * p * c] |
| x_embedder.proj.bias                        | patch_embed.bias                  |
| t_embedder.mlp.{0,2}.*                      | time_embed.{fc1,fc2}.*            |
| y_embedder.embedding_table.weight           | label_embed.weight                |
| blocks.i.adaLN_modulation.1.*               | blocks.i.modulation.*             |
| blocks.i.attn.{qkv,proj}.*                  | blocks.i.{qkv,proj}.*             |
| blocks.i.mlp.{fc1,fc2}.*                    | blocks.i.{fc1,fc2}.*              |
| final_layer.{adaLN_modulation.1,linear}.*   | final.{modulation,proj}.*         |
| pos_embed [1, N, C], frozen                 | computed; checked on import       |

The patch convolution's elements are ordered (channel, row, column), our patches (row, column, channel). Everything
else is the same numbers in the same order.
Source: Peebles and Xie 2022, DiT (arXiv:2212.09748), and its released checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.models.embeddings import position_embedding
from longreel.models.patches import grid_coords

_CONV = "x_embedder.proj.weight"
_POSITIONS = "pos_embed"


def original_keys(config: DiTConfig) -> dict[str, str]:
    """Original key -> our key of every parameter, frozen position embedding left out.

    Raises:
        ValueError: the configuration is not of the original's form, naming what differs.
    """
    _check_form(config)
    modules = {
        "x_embedder.proj": "patch_embed",
        "t_embedder.mlp.0": "time_embed.fc1",
        "t_embedder.mlp.2": "time_embed.fc2",
        "final_layer.adaLN_modulation.1": "final.modulation",
        "final_layer.linear": "final.proj",
    }
    parts = {
        "adaLN_modulation.1": "modulation",
        "attn.qkv": "qkv",
        "attn.proj": "proj",
        "mlp.fc1": "fc1",
        "mlp.fc2": "fc2",
    }
    for i in range(config.depth):
        modules |= {f"blocks.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in parts.items()}
    keys = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in modules.items() for kind in ("weight", "bias")}
    return keys | {"y_embedder.embedding_table.weight": "label_embed.weight"}


def import_original(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """A state dict of DiT(config) from one in the original's layout.

    Args:
        state: the original's state dict (of a training checkpoint, its "ema" or "model" entry). pos_embed may be
            left out; if there, it must be the embedding of a square grid that we would compute.
        config: of the original's form: class labels, adaLN, `2d` positions, patches of one frame.

    Returns:
        Our names to tensors, for DiT.load_state_dict; shares storage where no permutation is needed.

    Raises:
        ValueError: keys are missing or unexpected, or shapes are wrong, each listed; or pos_embed is another embedding.
    """
    keys = original_keys(config)
    missing = sorted(keys.keys() - state.keys())
    unexpected = sorted(state.keys() - keys.keys() - {_POSITIONS})
    if missing or unexpected:
        raise ValueError(
            f"not the original DiT's layout for this configuration: missing keys {_listing(missing)}; "
            f"unexpected keys {_listing(unexpected)}"
        )
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in DiT(config).state_dict().items()}
    _, ph, pw = config.patch_size
    wrong = []
    for theirs, ours in keys.items():
        shape = (config.hidden_size, config.in_channels, ph, pw) if theirs == _CONV else expected[ours]
        if tuple(state[theirs].shape) != shape:
            wrong.append(f"{theirs} is {list(state[theirs].shape)}, expected {list(shape)}")
    if wrong:
        raise ValueError(f"shapes that do not fit this configuration: {_listing(wrong)}")
    if _POSITIONS in state:
        _check_positions(state[_POSITIONS], config)
    result = {ours: state[theirs] for theirs, ours in keys.items()}
    result["patch_embed.weight"] = state[_CONV].permute(0, 2, 3, 1).reshape(config.hidden_size, config.patch_dim)
    return result


def export_original(state: Mapping[str, Tensor], config: DiTConfig, *, grid_size: int) -> dict[str, Tensor]:
    """The original's layout from a state dict of DiT(config); the inverse of import_original.

    Args:
        state: DiT(config).state_dict().
        config: of the original's form.
        grid_size: patches along each side of the square image whose frozen position embedding is stored: 16 for
            32x32 latents and patch 2.

    Returns:
        Original names to tensors, pos_embed [1, grid_size ** 2, C] among them.

    Raises:
        ValueError: the configuration is not of the original's form, state is not its state dict, or grid_size < 1.
    """
    if grid_size < 1:
        raise ValueError(f"grid_size must be at least 1, got {grid_size}")
    keys = original_keys(config)
    missing, unexpected = sorted(set(keys.values()) - state.keys()), sorted(state.keys() - set(keys.values()))
    if missing or unexpected:
        raise ValueError(
            f"not a state dict of this configuration: missing keys {_listing(missing)}; "
            f"unexpected keys {_listing(unexpected)}"
        )
    result = {theirs: state[ours] for theirs, ours in keys.items()}
    _, ph, pw = config.patch_size
    weight = state["patch_embed.weight"].reshape(config.hidden_size, ph, pw, config.in_channels)
    result[_CONV] = weight.permute(0, 3, 1, 2).contiguous()
    result[_POSITIONS] = _square_positions(grid_size, config).unsqueeze(0).to(weight.device)
    return result


def _check_form(config: DiTConfig) -> None:
    wrong = [
        text
        for text, differs in (
            ("num_classes = 0 (it has class labels)", config.num_classes == 0),
            (f"conditioning {config.conditioning!r} (it has 'adaln')", config.conditioning != "adaln"),
            (f"position {config.position!r} (it has '2d')", config.position != "2d"),
            (f"patch_size {config.patch_size} (it has one frame: (1, p, p))", config.patch_size[0] != 1),
        )
        if differs
    ]
    if wrong:
        raise ValueError(
            f"the original DiT is a class-conditioned image model; this configuration has {', '.join(wrong)}"
        )


def _check_positions(positions: Tensor, config: DiTConfig) -> None:
    side = math.isqrt(positions.shape[1]) if positions.dim() == 3 else 0
    if side < 1 or tuple(positions.shape) != (1, side * side, config.hidden_size):
        raise ValueError(
            f"pos_embed is {list(positions.shape)}, expected [1, N, {config.hidden_size}] with N a square number"
        )
    difference = (positions[0].cpu().double() - _square_positions(side, config).double()).abs().max().item()
    # A checkpoint in half precision holds rounded values in [-1, 1].
    if not difference <= torch.finfo(positions.dtype).eps * 2:
        raise ValueError(
            f"pos_embed differs by {difference:.3g} from the sin-cos embedding of a {side}x{side} grid, which the "
            "model computes; a checkpoint with another position embedding cannot be loaded"
        )


def _square_positions(side: int, config: DiTConfig) -> Tensor:
    coords = grid_coords((1, side, side), 0, side * side)
    return position_embedding(coords, config.hidden_size, "2d", torch.float32)


def _listing(names: list[str], limit: int = 8) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
