"""T5 and CLIP text features, by transformers.

Sources: Raffel et al. 2020, T5 (arXiv:1910.10683); Radford et al. 2021, CLIP (arXiv:2103.00020).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from longreel.models.pretrained import find_pretrained, load_pretrained
from longreel.models.weights_digest import weights_digest

# Characters of a caption that the tokenizer sees, per token of room: words are far shorter, and a caption of a megabyte
# would be tokenized whole to keep a few dozen tokens.
_CHARACTERS_PER_TOKEN = 64
CACHE_BYTES = 64 << 20


class PretrainedTextEncoder:
    """Features of a T5 encoder or a CLIP text model, see TextEncoder.

    T5's features of pads are zeros, so that a caption's features do not depend on max_tokens; CLIP's pads are tokens
    that Stable Diffusion attends to, and stay.

    Args:
        kind: `t5` or `clip`.
        path: folder of model and tokenizer (or of a pipeline that has them in `text_encoder` and `tokenizer`), or a
            hub name.
        max_tokens: L; longer captions are cut, shorter ones padded. None: what the tokenizer says, at most 77 for
            CLIP, and 120 for T5.
        batch_size: captions that go through the model at a time.
        dtype: of the weights. device: where they go.
        cache_bytes: memory for features of captions seen before; the least recently used ones go first.

    Raises:
        ValueError: there is no such model at path, or max_tokens is more than its positions.
    """

    def __init__(
        self,
        kind: Literal["t5", "clip"],
        path: str,
        *,
        max_tokens: int | None = None,
        batch_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, T5EncoderModel

        self.kind = kind
        source = find_pretrained("text_path", path)
        model_at = tokenizer_at = source
        if isinstance(source, Path) and (source / "text_encoder").is_dir() and not (source / "config.json").is_file():
            model_at, tokenizer_at = source / "text_encoder", source / "tokenizer"
        found: Any = load_pretrained(AutoConfig.from_pretrained, "text_path", model_at, whole=False)
        expected = ("t5",) if kind == "t5" else ("clip_text_model", "clip")
        if found.model_type not in expected:
            raise ValueError(f"text_path: {path} holds a model of type {found.model_type!r}, not {kind}")
        load: Any = (T5EncoderModel if kind == "t5" else CLIPTextModel).from_pretrained
        with _no_bars():
            model: Any = load_pretrained(load, "text_path", model_at, dtype=dtype)
        self._tokenizer: Any = load_pretrained(AutoTokenizer.from_pretrained, "text_path", tokenizer_at, whole=False)
        if self._tokenizer.pad_token_id is None:
            raise ValueError(f"text_path: the tokenizer of {path} has no padding token")
        self._model = model.to(device).eval().requires_grad_(False)
        self.text_dim: int = model.config.hidden_size
        room: int | None = getattr(model.config, "max_position_embeddings", None) if kind == "clip" else None
        self.max_tokens: int = max_tokens or (120 if room is None else room)
        if self.max_tokens < 2 or (room is not None and self.max_tokens > room):
            raise ValueError(
                f"max_tokens must be at least 2{'' if room is None else f' and at most {room}'} for {path}, "
                f"got {self.max_tokens}"
            )
        self.batch_size = batch_size
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def digest(self) -> str:
        """See TextEncoder."""
        return weights_digest(self._model, sorted(self._tokenizer.get_vocab().items()))

    def encode(self, captions: Sequence[str]) -> Tensor:
        """See TextEncoder.encode. Captions seen before are not computed again."""
        if isinstance(captions, str):
            raise ValueError(f"captions must be a sequence of strings, got the string {captions[:80]!r}; use [caption]")
        # What UTF-8 cannot hold (lone surrogates) the tokenizers cannot take.
        shown = [_readable(caption)[: self.max_tokens * _CHARACTERS_PER_TOKEN] for caption in captions]
        features = {caption: self._cache.pop(caption) for caption in dict.fromkeys(shown) if caption in self._cache}
        missing = [caption for caption in dict.fromkeys(shown) if caption not in features]
        for start in range(0, len(missing), self.batch_size):
            chunk = missing[start : start + self.batch_size]
            features |= zip(chunk, self._features(chunk).unbind(), strict=True)
        room = self.cache_bytes // (4 * self.max_tokens * self.text_dim)
        self._cache |= features
        while len(self._cache) > room:
            self._cache.popitem(last=False)
        if not shown:
            return torch.zeros(0, self.max_tokens, self.text_dim)
        return torch.stack([features[caption] for caption in shown])

    @torch.no_grad()
    def _features(self, captions: list[str]) -> Tensor:
        """[B, L, text_dim] fp32 on the CPU."""
        tokens = self._tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids, mask = tokens["input_ids"].to(self._model.device), tokens["attention_mask"].to(self._model.device)
        if self.kind == "clip":
            # Causal, so no token sees the pads behind it; without a mask pads are what Stable Diffusion makes of them.
            return self._model(input_ids=ids).last_hidden_state.float().cpu()
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return (hidden * mask.unsqueeze(-1)).cpu()


def _readable(caption: str) -> str:
    return caption.encode("utf-8", errors="replace").decode("utf-8")


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the library's progress bars, which every process would draw into ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
