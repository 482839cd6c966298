"""The DiT: patches of a latent video in, a prediction per patch out. Architecture only.

The strategy of sequence parallelism is an argument, and the model never asks about ranks. Parameters set the dtype of
the activations; timesteps and positions are embedded in fp32 or better and cast just before the first Linear.
Shape letters: B batch, s video tokens of this rank, l text tokens of this rank, L text tokens, C hidden size.
Source: Peebles and Xie 2022, DiT (arXiv:2212.09748).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longreel.kernels import adaln_modulate
from longreel.models.block import DiTBlock
from longreel.models.config import DiTConfig
from longreel.models.embeddings import embedding_dtype, position_embedding, timestep_embedding
from longreel.models.sequence import Packing, SequenceLengths, SequenceParallel
from longreel.models.tiled_final import tiled_final

FREQUENCY_DIM = 256
_INIT_STD = 0.02


class TimestepEmbedder(nn.Module):
    """Sin-cos embedding of the timestep through a two-layer SiLU MLP: [B] -> [B, C]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(FREQUENCY_DIM, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, timestep: Tensor) -> Tensor:
        dtype = self.fc1.weight.dtype
        frequencies = timestep_embedding(timestep.to(embedding_dtype(dtype)), FREQUENCY_DIM)
        return self.fc2(F.silu(self.fc1(frequencies.to(dtype))))


class FinalLayer(nn.Module):
    """adaLN (shift and scale, no gate) and the projection to a patch of out_channels: [B, s, C] -> [B, s, out]."""

    def __init__(self, hidden_size: int, out_dim: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, out_dim)
        # Rows of x taken at a time, modulated again in backward; None: all of them, by plain layers.
        self.tile: int | None = None

    def forward(self, x: Tensor, c: Tensor, segments: Tensor | None = None) -> Tensor:
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=-1)
        if self.tile is not None:
            weight, bias = self.proj.weight, self.proj.bias
            return tiled_final(x, shift, scale, weight, bias, segments=segments, tile=self.tile)
        return self.proj(adaln_modulate(x, shift, scale, cu_seqlens=segments))


class DiT(nn.Module):
    """Video diffusion transformer over 3-D patches.

    What conditions it, by configuration:
    - the timestep, always, through adaLN-zero in every block;
    - class labels (num_classes > 0), added to the timestep embedding;
    - text: its mean added to the timestep embedding (`adaln`; left out when there are class labels, as in the original
      model), attended to in every block (`cross`), or put in front of the video tokens (`in_context`).
    Text features carry their own positions: the model adds none to them.

    Args:
        config: sizes and choices. Weights follow torch's global generator: deterministic under torch.manual_seed.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embed = nn.Linear(config.patch_dim, width)
        self.time_embed = TimestepEmbedder(width)
        # The last row is the null class of guidance.
        self.label_embed = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.text_proj = nn.Linear(config.text_dim, width) if takes_text(config) else None
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        patch_volume = config.patch_dim // config.in_channels
        self.final = FinalLayer(width, patch_volume * config.out_channels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as the original DiT: Xavier Linears, zero biases, zero gates and output, so it predicts zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.time_embed.fc1.weight, std=_INIT_STD)
        nn.init.normal_(self.time_embed.fc2.weight, std=_INIT_STD)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=_INIT_STD)
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            block.zero_residual_paths()
        nn.init.zeros_(self.final.modulation.weight)
        nn.init.zeros_(self.final.proj.weight)

    def forward(
        self,
        tokens: Tensor,
        coords: Tensor,
        timestep: Tensor,
        *,
        text: Tensor | None = None,
        labels: Tensor | None = None,
        sp: SequenceParallel,
        lengths: SequenceLengths,
        text_lengths: SequenceLengths | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Prediction for this rank's patches.

        Args:
            tokens: [B, s, patch_dim] video patches of this rank, padding rows included; s may be 0 (`in_context`).
            coords: [s, 3] (t, h, w) patch coordinates of those rows, fp32 or fp64.
            timestep: [B] in [0, 1000), fp32 or fp64.
            text: text features. `adaln` and `cross` replicated: all text [B, L, text_dim]. `cross` published: this
                rank's rows of the padded text. `in_context`: this rank's text rows [B, l, text_dim], l may be 0; the
                local sequence is [text rows, video rows].
            labels: [B] int64 class labels, num_classes being the null class; needed when num_classes > 0.
            sp: the strategy.
            lengths: of the whole sequence over all ranks; text and video together for `in_context`.
            text_lengths: of the text, for the published cross attention.
            packing: of a batch of N clips packed into one sequence. B is 1 then for tokens (and for the text rows of
                `in_context`), N for timestep, labels and other text; lengths has cu_seqlens.

        Returns:
            [B, s, patch volume * out_channels] in the weights' dtype, elements ordered (pt, ph, pw, channel).

        Raises:
            ValueError: an input is missing, not taken by this configuration, or has the wrong shape.
        """
        self._check_inputs(tokens, coords, timestep, text, labels, packing)
        dtype = self.patch_embed.weight.dtype
        x = self.patch_embed(tokens.to(dtype))
        position = position_embedding(coords, self.config.hidden_size, self.config.position, dtype)
        x = torch.add(x, position, alpha=self.config.position_gain)

        c = self.time_embed(timestep)
        if self.label_embed is not None:
            c = c + self.label_embed(labels)

        num_text_rows = 0
        if text is not None and self.text_proj is not None:
            if self.config.conditioning == "adaln":
                c = c + self.text_proj(text.mean(dim=1).to(dtype))
                text = None
            else:
                text = self.text_proj(text.to(dtype))
                if self.config.conditioning == "in_context":
                    num_text_rows = text.shape[1]
                    x = torch.cat([text, x], dim=1)
                    if packing is not None and packing.order is not None:
                        x = x.index_select(1, packing.order)
                    text = None

        for block in self.blocks:
            x = block(x, c, text, sp=sp, lengths=lengths, text_lengths=text_lengths, packing=packing)
        if packing is None:
            return self.final(x[:, num_text_rows:], c)
        video = x if packing.video_rows is None else x.index_select(1, packing.video_rows)
        return self.final(video, c, packing.video_segments)

    def _check_inputs(
        self,
        tokens: Tensor,
        coords: Tensor,
        timestep: Tensor,
        text: Tensor | None,
        labels: Tensor | None,
        packing: Packing | None,
    ) -> None:
        config = self.config
        if packing is not None and tokens.shape[0] != 1:
            raise ValueError(f"a packed batch has tokens [1, s, patch_dim], got {list(tokens.shape)}")
        clips = tokens.shape[0] if packing is None else packing.segments.shape[0] - 1
        if tokens.dim() != 3 or tokens.shape[2] != config.patch_dim:
            raise ValueError(f"tokens must be [B, s, patch_dim = {config.patch_dim}], got {list(tokens.shape)}")
        if coords.shape[:1] != tokens.shape[1:2]:
            raise ValueError(
                f"coords {list(coords.shape)} must have one row per token, tokens are {list(tokens.shape)}"
            )
        if list(timestep.shape) != [clips]:
            raise ValueError(f"timestep must be [{clips}], one per clip, got {list(timestep.shape)}")
        if not timestep.is_floating_point() or timestep.element_size() < 4:
            raise ValueError(f"timestep has dtype {timestep.dtype}; half precision rounds it, use float32 or float64")
        if (labels is not None) != (config.num_classes > 0):
            raise ValueError(
                f"labels are {'given' if labels is not None else 'missing'}, and the model has num_classes = "
                f"{config.num_classes}; give labels exactly when num_classes > 0"
            )
        if (text is not None) != takes_text(config):
            raise ValueError(
                f"text is {'given' if text is not None else 'missing'}, and conditioning {config.conditioning!r} with "
                f"num_classes = {config.num_classes} {'needs' if takes_text(config) else 'takes no'} text"
            )
        # Text in the sequence is packed with it.
        texts = tokens.shape[0] if config.conditioning == "in_context" else clips
        if text is not None and (text.dim() != 3 or text.shape[::2] != (texts, config.text_dim)):
            raise ValueError(f"text must be [{texts}, L, text_dim = {config.text_dim}], got {list(text.shape)}")


def takes_text(config: DiTConfig) -> bool:
    """Whether the model is conditioned on text: always, except adaLN with class labels, as in the original model."""
    return config.conditioning != "adaln" or config.num_classes == 0


def parameter_count(config: DiTConfig, *, frozen_position_tokens: int = 0) -> int:
    """Parameters of the model, without building it in memory.

    Args:
        config: the model.
        frozen_position_tokens: rows of a stored position embedding to count as well. Ours is computed and has none;
            the original stores one row of C per token and counts it: 256 for 32x32 latents and patch 2, which gives
            DiT-XL/2 its 675,129,632.

    Returns:
        Number of parameters.
    """
    with torch.device("meta"):
        model = DiT(config)
    return sum(p.numel() for p in model.parameters()) + frozen_position_tokens * config.hidden_size
