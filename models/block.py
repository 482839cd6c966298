"""One DiT block: adaLN-zero around self-attention and the MLP, with text attention where the configuration has it.

Shape letters: B batch, s tokens of this rank, C hidden size, H heads, D head_dim, L text tokens.
Source: Peebles and Xie 2022, DiT (arXiv:2212.09748), adaLN-zero block; Chen et al. 2023, PixArt-alpha
(arXiv:2310.00426), where the text attention sits and how it starts.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from longreel.kernels import adaln_modulate, attention, bias_gelu, gated_residual, gated_residual_adaln
from longreel.models.config import DiTConfig
from longreel.models.sequence import Packing, SequenceLengths, SequenceParallel
from longreel.models.tiled_mlp import tiled_mlp


class TextAttention(nn.Module):
    """Cross attention from video tokens to text tokens, with its output projection.

    Layout `replicated`: every rank holds all text, attends with its own queries and sends nothing. Layout `published`:
    text is sharded and the strategy splits the heads, as the code behind the published table did.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.layout = config.cross_layout
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        # Rows are ordered [2, H, D]: keys, then values.
        self.kv = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        *,
        sp: SequenceParallel,
        lengths: SequenceLengths,
        text_lengths: SequenceLengths | None,
        packing: Packing | None = None,
    ) -> Tensor:
        """x [B, s, C] over text [B, L, C] (or this rank's rows of it, `published`); returns [B, s, C].

        Packed, x is [1, s, C], text [N, L, C], and the rows of a clip attend to the text of that clip.
        """
        if self.layout == "published":
            if text_lengths is None:
                raise ValueError("cross_layout 'published' shards the text: give text_lengths")
            out = sp.cross_attention(
                x, text, self.q, self.kv, num_heads=self.num_heads, lengths=lengths, text_lengths=text_lengths
            )
            return self.proj(out)
        q_BSHD = self.q(x).unflatten(-1, (self.num_heads, -1))
        if packing is not None:
            text = text.flatten(0, 1).unsqueeze(0)
        k_BLHD, v_BLHD = self.kv(text).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        out_BSHD, _ = attention(
            q_BSHD,
            k_BLHD,
            v_BLHD,
            cu_seqlens_q=packing.segments if packing else None,
            cu_seqlens_k=packing.text_segments if packing else None,
            provider=sp.provider,
        )
        return self.proj(out_BSHD.flatten(2))


class DiTBlock(nn.Module):
    """x + gate * attention(modulate(x)), then text attention if there is any, then x + gate * mlp(modulate(x)).

    `text_only` puts the text attention in the self-attention's place (modulated input, gated output). Otherwise the
    text attention adds to the residual stream unmodulated and ungated, its projection starting at zero.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.text_only = config.text_only
        # Six rows of C: shift, scale and gate of the attention, then of the MLP.
        self.modulation = nn.Linear(width, 6 * width)
        if not config.text_only:
            # Rows are ordered [3, H, D]: queries, keys, values.
            self.qkv = nn.Linear(width, 3 * width)
            self.proj = nn.Linear(width, width)
        self.cross = TextAttention(config) if config.conditioning == "cross" else None
        self.fc1 = nn.Linear(width, config.mlp_hidden)
        self.fc2 = nn.Linear(config.mlp_hidden, width)
        # Rows of x that the MLP takes at a time; None: all of them, by plain layers.
        self.mlp_tile: int | None = None

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        text: Tensor | None,
        *,
        sp: SequenceParallel,
        lengths: SequenceLengths,
        text_lengths: SequenceLengths | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """One block on this rank's rows.

        Args:
            x: [B, s, C]. c: [B, C], what modulates. text: [B, L, C] projected text of a cross attention, or None.
            sp: the strategy. lengths: of the whole sequence; text_lengths: of the sharded text (`published`).
            packing: of a packed batch: x is [1, s, C], c [N, C] and text [N, L, C] then.

        Returns:
            [B, s, C].
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(c)).chunk(6, dim=-1)
        segments = packing.segments if packing else None
        over_text = {"sp": sp, "lengths": lengths, "text_lengths": text_lengths, "packing": packing}
        modulated = adaln_modulate(x, shift_a, scale_a, cu_seqlens=segments)
        if self.text_only:
            attended = self._attend_text(modulated, text, **over_text)
        else:
            heads = sp.self_attention(modulated, self.qkv, num_heads=self.num_heads, lengths=lengths)
            attended = self.proj(heads)
        if self.text_only or self.cross is None:
            x, modulated = gated_residual_adaln(x, attended, gate_a, shift_m, scale_m, cu_seqlens=segments)
        else:
            x = gated_residual(x, attended, gate_a, cu_seqlens=segments)
            x = x + self._attend_text(x, text, **over_text)
            modulated = adaln_modulate(x, shift_m, scale_m, cu_seqlens=segments)
        return gated_residual(x, self._mlp(modulated), gate_m, cu_seqlens=segments)

    def _mlp(self, x: Tensor) -> Tensor:
        if self.mlp_tile is not None:
            return tiled_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, tile=self.mlp_tile)
        # The bias joins the GELU's pass over the hidden layer instead of the GEMM's epilogue.
        return self.fc2(bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias))

    def _attend_text(self, x: Tensor, text: Tensor | None, **over_text: Any) -> Tensor:
        assert self.cross is not None
        if text is None:
            raise ValueError("text is missing, and the block's text attention needs it")
        return self.cross(x, text, **over_text)

    def zero_residual_paths(self) -> None:
        """Initialise the block as the identity: zero gates (adaLN-zero) and a zero text projection where ungated."""
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        if self.cross is not None and not self.text_only:
            nn.init.zeros_(self.cross.proj.weight)
