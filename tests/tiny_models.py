"""Folders of tiny models with random weights, laid out as those on a model hub, tokenizer included."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import torch


def write_t5(folder: Path) -> None:
    """A T5 encoder of width 16, and a SentencePiece model trained on a few words."""
    import sentencepiece
    from transformers import T5Config, T5EncoderModel

    text = "a red square moves to the right blue circle down left yellow up green and then stays"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text, *text.split()] * 3),
        model_writer=model,
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5EncoderModel(config).save_pretrained(folder)


def write_clip(folder: Path) -> None:
    """A CLIP text model of width 16 and 20 positions, and its tokenizer over single bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel

    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(symbol + "</w>" for symbol in alphabet), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    config = CLIPTextConfig(
        vocab_size=len(symbols),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        bos_token_id=len(symbols) - 2,
        eos_token_id=len(symbols) - 1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPTextModel(config).save_pretrained(folder)


def write_sd_vae(folder: Path) -> None:
    """An AutoencoderKL with 4 channels at a quarter of the size; it has a shift, as later models do."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=4,
            scaling_factor=0.5,
            shift_factor=0.25,
        )
    vae.save_pretrained(folder)


def write_vqvae(folder: Path) -> None:
    """Our VQ-VAE, untrained but for its codebooks."""
    from longreel.models.vqvae import VQVAE, VQVAEConfig, save_vqvae

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VQVAE(VQVAEConfig(hidden=8, channels=4, codebooks=2, codebook_size=16, res_blocks=1))
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
            _, _, quantised = model(torch.rand(1, 8, 32, 32, 3) * 2 - 1)
        model.fit_latent_scale(quantised)
    save_vqvae(model, folder)


WRITERS: dict[str, Callable[[Path], None]] = {
    "t5": write_t5,
    "clip": write_clip,
    "sd-vae": write_sd_vae,
    "vqvae": write_vqvae,
}
