"""Text features from bytes: nothing to download, nothing trained, the same numbers in every process.

Each caption becomes BOS, its UTF-8 bytes, EOS and pads; each symbol a fixed Gaussian vector, bound to its position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longreel.models.embeddings import timestep_embedding

BOS, EOS, PAD = 256, 257, 258
NUM_SYMBOLS = 259
_SEED = 20240304
# Variance 1 of the symbol and about 1/4 of the centred sinusoid.
_SCALE = math.sqrt(1.25)


class ByteTextEncoder:
    """Byte-level text features of about unit variance.

    Feature of symbol b at position p: (e_b * s_p + sinusoid_p) / sqrt(1.25), e_b Gaussian, s_p = 1 on the first half of
    the channels and random signs on the second. The first half says which byte it is wherever it stands; the second
    binds byte and position, so that even the mean over tokens tells "ab" from "ba". Pads are symbols like others and
    are attended to, as in CLIP. The empty caption "" is the null caption of classifier-free guidance.

    Args:
        text_dim: width of the features, even.
        max_tokens: L, tokens per caption with BOS and EOS; longer captions are cut between two characters.

    Raises:
        ValueError: text_dim is odd or below 2, or max_tokens below 3.

    Source: the binding of symbols to positions by signs follows Gayler 1998, multiplicative binding.
    """

    def __init__(self, text_dim: int, max_tokens: int) -> None:
        if text_dim < 2 or text_dim % 2:
            raise ValueError(f"text_dim must be even and at least 2, got {text_dim}")
        if max_tokens < 3:
            raise ValueError(f"max_tokens must be at least 3 (BOS, one byte, EOS), got {max_tokens}")
        self.text_dim = text_dim
        self.max_tokens = max_tokens
        generator = torch.Generator().manual_seed(_SEED)
        # Normal numbers from uniform fp64 ones: torch.randn takes other paths on other CPUs, the Mersenne twister's
        # uniform numbers are the same everywhere. Not by erfinv: in 4 of some 460 processes (torch 2.13.0, two busy
        # cores) its first call gave the second half of the table, a second thread's share, to 6e-9 only.
        uniform = torch.rand(NUM_SYMBOLS, text_dim, generator=generator, dtype=torch.float64)
        self._symbols = torch.special.ndtri(uniform)
        self._signs = torch.randint(0, 2, (max_tokens, text_dim), generator=generator).double() * 2 - 1
        self._signs[:, : text_dim // 2] = 1
        sinusoids = timestep_embedding(torch.arange(max_tokens, dtype=torch.float64), text_dim)
        # Centred, so that the mean over tokens holds no constant far above what tells captions apart.
        self._positions = sinusoids - sinusoids.mean(dim=0)

    def tokenize(self, caption: str) -> list[int]:
        """Symbols of one caption, max_tokens of them; what UTF-8 cannot hold (lone surrogates) becomes "?"."""
        data = caption.encode("utf-8", errors="replace")[: self.max_tokens - 2]
        # A cut inside a character leaves an incomplete sequence at the end, which decoding drops.
        data = data.decode("utf-8", errors="ignore").encode("utf-8")
        symbols = [BOS, *data, EOS]
        return symbols + [PAD] * (self.max_tokens - len(symbols))

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Features of a batch of captions.

        Args:
            captions: B strings.

        Returns:
            [B, L, text_dim], fp32, on the CPU.

        Raises:
            ValueError: captions is one string instead of a sequence of them.
        """
        if isinstance(captions, str):
            raise ValueError(f"captions must be a sequence of strings, got the string {captions!r}; use [caption]")
        ids = torch.tensor([self.tokenize(caption) for caption in captions], dtype=torch.int64)
        bound = self._symbols[ids.reshape(len(captions), self.max_tokens)] * self._signs
        return ((bound + self._positions) / _SCALE).float()
