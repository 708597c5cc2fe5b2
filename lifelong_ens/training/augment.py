"""Random crops and flips of whole batches, on their device, with a choice of its own for every image."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Literal["none", "flip", "crop_flip"]


def augment(images: Tensor, kind: Augmentation, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Flipped, or cropped and flipped, copies of ``(batch, C, H, W)``.

    Args:
        images: A batch; zero is what a crop shows beyond the border.
        kind: ``flip`` mirrors half of the images; ``crop_flip`` also moves each by up to ``padding`` pixels,
            as is usual on CIFAR (He et al. 2016, section 4.2).
        generator: Where all random choices come from; on the device of the images.
        padding: Pixels added on each side before the crop.
    """
    if kind == "none":
        return images
    batch, _, height, width = images.shape
    device = images.device
    shift = padding if kind == "crop_flip" else 0
    columns = torch.arange(width, device=device).expand(batch, width)
    flipped = torch.rand(batch, 1, generator=generator, device=device) < 0.5
    columns = torch.where(flipped, width - 1 - columns, columns)
    rows = torch.arange(height, device=device).expand(batch, height)
    if shift:
        images = F.pad(images, [shift] * 4)
        offsets = torch.randint(0, 2 * shift + 1, (2, batch, 1), generator=generator, device=device)
        rows, columns = rows + offsets[0], columns + offsets[1]
    # one gather per axis keeps the channels where they are
    width_in = images.shape[3]
    picked = images.gather(2, rows[:, None, :, None].expand(-1, images.shape[1], -1, width_in))
    return picked.gather(3, columns[:, None, None, :].expand(-1, images.shape[1], height, -1))
