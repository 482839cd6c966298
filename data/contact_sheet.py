"""A picture of what was prepared: one frame of some clips, decoded from their latents, over their captions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from longreel.data.shards import ShardDataset
from longreel.models.autoencoders import Autoencoder
from longreel.models.publish import published

_WIDTH, _HEIGHT, _TEXT, _GAP = 192, 144, 30, 6


def write_contact_sheet(path: Path, clips: ShardDataset, autoencoder: Autoencoder, *, count: int) -> None:
    """Write a PNG of `count` clips, spread evenly over the folder.

    Args:
        path: file to write. clips: what to show. autoencoder: that made them. count: pictures at most.

    Raises:
        ShardError: a shard is damaged.
        OSError: the file cannot be written.
    """
    chosen = [round(i * (len(clips) - 1) / max(1, count - 1)) for i in range(count)] if len(clips) > count else None
    indices = list(range(len(clips))) if chosen is None else chosen
    columns = math.ceil(math.sqrt(len(indices)))
    rows = math.ceil(len(indices) / columns)
    cell_width, cell_height = _WIDTH + _GAP, _HEIGHT + _TEXT + _GAP
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for place, index in enumerate(indices):
        clip = clips[index]
        left, top = _GAP + place % columns * cell_width, _GAP + place // columns * cell_height
        # The middle latent frame: first frames are often black.
        middle = len(clip.latents) // 2
        decoded = autoencoder.decode(clip.latents[None, middle : middle + 1])[0, 0]
        levels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
        picture = Image.fromarray(np.ascontiguousarray(levels))
        picture.thumbnail((_WIDTH, _HEIGHT))
        sheet.paste(picture, (left + (_WIDTH - picture.width) // 2, top + (_HEIGHT - picture.height) // 2))
        row = clips.rows[index]
        size = f"{row['frames']} x {row['height']} x {row['width']}, {row['fps']:.4g} fps"
        caption = " ".join(clip.captions[0][:200].split())
        for line, words in enumerate((caption, size)):
            while words and draw.textlength(words, font=font) > _WIDTH:
                words = words[:-1]
            draw.text((left, top + _HEIGHT + 2 + 13 * line), words, fill="black", font=font)
    with published(path) as partial:
        sheet.save(partial, format="PNG")
