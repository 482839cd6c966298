"""Videos to 3-D patches and back, and the coordinates of a range of patches.

Tokens are ordered (t, h, w), the elements of a token (pt, ph, pw, channel); the original DiT's (ph, pw, channel) output
order is this with pt = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(video: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Cut a video into patches.

    Args:
        video: [B, T, H, W, C].
        patch_size: (pt, ph, pw) elements of a patch.

    Returns:
        [B, N, pt * ph * pw * C], N = T/pt * H/ph * W/pw, contiguous.

    Raises:
        ValueError: video is not five-dimensional, or a size is not a multiple of the patch size.
    """
    if video.dim() != 5:
        raise ValueError(f"video must be [B, T, H, W, C], got {list(video.shape)}")
    batch, *sizes, channels = video.shape
    for name, size, patch in zip(("T", "H", "W"), sizes, patch_size, strict=True):
        if size % patch:
            raise ValueError(f"video {list(video.shape)} has {name} = {size}, not a multiple of the patch size {patch}")
    pt, ph, pw = patch_size
    t, h, w = (size // patch for size, patch in zip(sizes, patch_size, strict=True))
    split = video.reshape(batch, t, pt, h, ph, w, pw, channels)
    return split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, t * h * w, pt * ph * pw * channels)


def unpatchify(
    tokens: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int], num_channels: int
) -> Tensor:
    """Put patches back together; the inverse of patchify.

    Args:
        tokens: [B, N, pt * ph * pw * C], without padding rows.
        grid: (t, h, w) patches, N = t * h * w.
        patch_size: (pt, ph, pw) elements of a patch.
        num_channels: C.

    Returns:
        [B, t * pt, h * ph, w * pw, C].

    Raises:
        ValueError: tokens do not fit grid, patch size and channels.
    """
    (t, h, w), (pt, ph, pw) = grid, patch_size
    if tokens.dim() != 3 or tokens.shape[1:] != (t * h * w, pt * ph * pw * num_channels):
        raise ValueError(
            f"tokens {list(tokens.shape)} must be [B, {t * h * w}, {pt * ph * pw * num_channels}] for grid {grid}, "
            f"patch size {patch_size} and {num_channels} channels"
        )
    split = tokens.reshape(-1, t, h, w, pt, ph, pw, num_channels)
    return split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, t * pt, h * ph, w * pw, num_channels)


def grid_coords(
    grid: tuple[int, int, int],
    start: int,
    stop: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Coordinates (t, h, w) of tokens start .. stop - 1 in (t, h, w) order.

    Args:
        grid: (t, h, w) patches.
        start, stop: flat range. Rows from t * h * w on are padding: they count on into frames that do not exist.
        device, dtype: of the result.

    Returns:
        [stop - start, 3] in patches.

    Raises:
        ValueError: the range is negative or runs backwards, or a grid size is below 1.
    """
    if min(grid) < 1:
        raise ValueError(f"grid must have three positive sizes (t, h, w), got {grid}")
    if not 0 <= start <= stop:
        raise ValueError(f"token range {start} .. {stop} must satisfy 0 <= start <= stop")
    _, h, w = grid
    index = torch.arange(start, stop, device=device)
    return torch.stack([index // (h * w), index // w % h, index % w], dim=1).to(dtype)
