"""Text to features: one interface over T5, CLIP, and a built-in encoder that needs no download.

The built-in one works on bytes: nothing trained, the same numbers in every process. Each caption becomes BOS, its UTF-8
bytes, EOS and pads; each symbol a fixed Gaussian vector, bound to its position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from longreel.models.autoencoders import DTYPES, WeightDtype
from longreel.models.embeddings import timestep_embedding

TextEncoderName = Literal["bytes", "t5", "clip"]

BOS, EOS, PAD = 256, 257, 258
NUM_SYMBOLS = 259
DEFAULT_BYTE_TOKENS = 48
_SEED = 20240304
# Variance 1 of the symbol and about 1/4 of the centred sinusoid.
_SCALE = math.sqrt(1.25)


class TextEncoder(Protocol):
    """Captions to features; "" is the null caption of classifier-free guidance."""

    @property
    def text_dim(self) -> int:
        """Width of the features."""
        ...

    @property
    def max_tokens(self) -> int:
        """L, tokens per caption."""
        ...

    @property
    def digest(self) -> str:
        """Names weights and tokenizer: two encoders of one digest and one configuration give the same features."""
        ...

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Features [B, L, text_dim] of B captions, fp32, on the CPU; ValueError for one string instead of several."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """Which text encoder, and how it runs.

    Args:
        text_encoder: `bytes` (built in), `t5` or `clip`.
        text_path: folder of model and tokenizer, or a hub name; for t5 and clip.
        text_dim: width of the features of `bytes`, even; t5 and clip have their own.
        max_text_tokens: tokens of a caption that are read; 48 for `bytes`, 120 for t5, what clip has if not given.
        text_batch: captions that go through the model at a time.
        text_dtype: of the model's weights: fp32, fp16 or bf16.
    """

    text_encoder: TextEncoderName = "bytes"
    text_path: str | None = None
    text_dim: int = 128
    max_text_tokens: int | None = None
    text_batch: int = 16
    text_dtype: WeightDtype = "fp32"

    def __post_init__(self) -> None:
        if self.text_encoder not in get_args(TextEncoderName):
            raise ValueError(
                f"text_encoder must be one of {', '.join(get_args(TextEncoderName))}; got {self.text_encoder!r}"
            )
        if (self.text_encoder == "bytes") != (self.text_path is None):
            raise ValueError(
                "text_encoder 'bytes' is built in and takes no text_path"
                if self.text_encoder == "bytes"
                else f"text_encoder {self.text_encoder!r} needs text_path: the folder of its model, or a hub name"
            )
        if self.text_batch < 1:
            raise ValueError(f"text_batch must be at least 1, got {self.text_batch}")
        if self.text_dtype not in DTYPES:
            raise ValueError(f"text_dtype must be one of {', '.join(DTYPES)}; got {self.text_dtype!r}")
        unread = ("text_batch", "text_dtype") if self.text_encoder == "bytes" else ("text_dim",)
        for name in unread:
            if (value := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} {value} has no effect with text_encoder {self.text_encoder!r}; leave it out")


def build_text_encoder(config: TextEncoderConfig, *, device: torch.device | str = "cpu") -> TextEncoder:
    """The text encoder that a configuration names, its weights on a device.

    Raises:
        ValueError: there is no such model, or sizes do not fit.
    """
    if config.text_encoder == "bytes":
        return ByteTextEncoder(config.text_dim, config.max_text_tokens or DEFAULT_BYTE_TOKENS)
    from longreel.models.text_pretrained import PretrainedTextEncoder

    assert config.text_path is not None
    return PretrainedTextEncoder(
        config.text_encoder,
        config.text_path,
        max_tokens=config.max_text_tokens,
        batch_size=config.text_batch,
        dtype=DTYPES[config.text_dtype],
        device=device,
    )


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

    digest = ""

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
