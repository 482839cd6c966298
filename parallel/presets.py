"""Sets of choices for training, from a smoke run to 8 GPUs: words of the command line that stand before the user's.

What a preset sets is written out in every checkpoint, and anything after it on the command line wins.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from longreel.parallel.config import CHOSEN_BY_PLAN

# What a demo is trained as: one clip per caption; x0 as what is predicted, since a patch holds more numbers than the
# model is wide; positions large enough that so few patches are told apart (position_gain); timesteps close to noise
# (timestep_shift), where what is where is decided.
_SMOKE = """
    --num-frames 8 --frame-stride 4 --height 32 --width 32 --patch-size 4 8 8 --depth 2 --hidden-size 128
    --conditioning adaln --position-gain 4 --prediction x0 --timestep-shift 10 --min-weighed-t 0.5
    --steps 1500 --batch-size 4 --learning-rate 2e-3 --schedule cosine --warmup-steps 20 --checkpoint-every 500
    --clip-norm 1 --ema-decay 0.98
"""
_LARGE = """
    --schedule cosine --warmup-steps 1000 --learning-rate 1e-4 --clip-norm 1 --ema-decay 0.9999 --precision bf16
    --timesteps logit-normal --steps 400000 --checkpoint-every 1000 --log-every 10 --keep 3
"""

PRESETS: dict[str, tuple[str, str]] = {
    "smoke": ("four drawn clips, about a minute on 2 CPU cores", f"--demo {_SMOKE}"),
    "small": (
        "DiT-S/2 on shards, one GPU of 24 GB or more",
        f"{_LARGE} --dit dit-s-2 --token-budget 16384 --batch-size 4 --conditioning cross",
    ),
    "xl2-131k": (
        "DiT-XL/2 on shards, 8 GPUs of 80 GB, sequences of 131,072 tokens: data parallel, attention kept",
        f"{_LARGE} --dit dit-xl-2 --token-budget 131072 --batch-size 8 --conditioning cross "
        "--engine fsdp2-zero2 --policy keep_attention",
    ),
    "xl2-819k": (
        "DiT-XL/2 on shards, 8 GPUs of 80 GB, sequences of 819,200 tokens: 2 ranks share one, attention kept",
        f"{_LARGE} --dit dit-xl-2 --token-budget 819200 --batch-size 4 --conditioning cross "
        "--engine fsdp2-zero2 --strategy fastseq --sp-degree 2 --policy keep_attention",
    ),
}


def with_preset(words: Sequence[str]) -> list[str]:
    """A command line with its preset's words in front, but for what --plan chooses; --demo alone is that of `smoke`.

    Args:
        words: of parallel/train.py, without the program's name.

    Raises:
        ValueError: there is no such preset.
    """
    name = _last(words, "--preset")
    if name is None and "--demo" in words:
        return [*_SMOKE.split(), *words]
    if name is None:
        return list(words)
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; presets are {', '.join(PRESETS)}")
    replaced: set[str] = set()
    if any(word.partition("=")[0] in ("--videos", "--shards") for word in words):
        # Other clips take the place of a preset's.
        replaced.add("--demo")
    if _last(words, "--plan") == "auto":
        replaced |= {f"--{option.replace('_', '-')}" for option in CHOSEN_BY_PLAN}
    preset = _without(PRESETS[name][1].split(), replaced)
    if any(word.partition("=")[0] == "--shards" for word in words):
        # Whose frames were chosen when they were made.
        preset += ["--frame-stride", "1"]
    return preset + list(words)


def _without(words: Sequence[str], options: Collection[str]) -> list[str]:
    """Words of a preset without some options and their values."""
    kept, keeps = [], True
    for word in words:
        if word.startswith("--"):
            keeps = word not in options
        if keeps:
            kept.append(word)
    return kept


def _last(words: Sequence[str], option: str) -> str | None:
    """The value that a command line gives an option; the last one counts."""
    found = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == option and following is not None:
            found = following
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found
