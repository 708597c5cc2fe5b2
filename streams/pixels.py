"""Arrays of images brought to one layout and size."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import interpolate

_CHUNK = 1024


def resize(images: np.ndarray, image_size: int | None) -> np.ndarray:
    """Images uint8 ``(n, C, H, W)`` at ``image_size`` x ``image_size``, antialiased; ``None`` keeps them."""
    if image_size is None or images.shape[2:] == (image_size, image_size):
        return images
    resized = np.empty((*images.shape[:2], image_size, image_size), dtype=np.uint8)
    for start in range(0, len(images), _CHUNK):
        chunk = torch.from_numpy(np.ascontiguousarray(images[start : start + _CHUNK])).float()
        chunk = interpolate(chunk, (image_size, image_size), mode="bilinear", antialias=True)
        resized[start : start + _CHUNK] = chunk.round().clamp(0, 255).byte().numpy()
    return resized
