"""Linear filters of whole batches: Gaussian and motion blur, zoom into the centre, bilinear sampling.

Images are float ``(batch, C, H, W)``. Each filter keeps the borders as the library does that the published code calls.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Border = Literal["nearest", "reflect"]


def gaussian_blur(
    images: Tensor, sigma: float, *, truncate: float = 4.0, border: Border = "nearest"
) -> Tensor:
    """Gaussian filter along height and width, cut off at ``truncate`` standard deviations.

    Args:
        images: ``(..., H, W)``.
        sigma: Standard deviation in pixels; below ``0.5 / truncate`` nothing happens.
        truncate: Radius of the kernel in standard deviations.
        border: ``nearest`` repeats the outermost pixel, ``reflect`` mirrors at the image's edge; scipy's names.
    """
    if int(truncate * sigma + 0.5) == 0:
        return images
    rows, columns = (_gaussian_matrix(size, sigma, truncate, border).to(images) for size in images.shape[-2:])
    return rows @ images @ columns.T


def _gaussian_matrix(size: int, sigma: float, truncate: float, border: Border) -> Tensor:
    """The filter of a line as a matrix ``(size, size)``: any radius fits, and the border is in it."""
    radius = int(truncate * sigma + 0.5)
    steps = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (steps.double() / sigma) ** 2)
    source = torch.arange(size)[:, None] + steps
    if border == "nearest":
        source = source.clamp(0, size - 1)
    else:
        source = source.remainder(2 * size)
        source = torch.minimum(source, 2 * size - 1 - source)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, source, (weights / weights.sum()).expand(size, -1))


def motion_blur(images: Tensor, radius: float, sigma: float, angles: Tensor) -> Tensor:
    """Blur along one direction per image with one half of a Gaussian, as ImageMagick's ``-motion-blur``.

    Args:
        images: ``(batch, C, H, W)``; outside the image the outermost pixels go on.
        radius: In pixels; the kernel has ``2 * ceil(radius) + 1`` taps, all ahead of the pixel.
        sigma: Standard deviation in pixels.
        angles: ``(batch,)`` in degrees; 0 looks to the right, 90 down.
    """
    batch, channels, height, width = images.shape
    taps = torch.arange(2 * math.ceil(radius) + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (taps / sigma) ** 2)
    kernel /= kernel.sum()
    radians = angles.to(device=images.device, dtype=torch.float32).deg2rad()[:, None, None]
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    flat, blurred = images.flatten(2), torch.zeros_like(images).flatten(2)
    for tap, weight in enumerate(kernel.tolist()):
        if weight < 1e-6:  # less than a thousandth of a level, and so is all that follows
            break
        down = (tap * radians.sin() - 0.5).ceil().long()
        right = (tap * radians.cos() - 0.5).ceil().long()
        source = (rows + down).clamp(0, height - 1) * width + (columns + right).clamp(0, width - 1)
        blurred += weight * flat.gather(2, source.flatten(1)[:, None].expand(-1, channels, -1))
    return blurred.view(batch, channels, height, width)


def zoom(images: Tensor, factor: float) -> Tensor:
    """The centre of each image enlarged by ``factor``, bilinearly, to the image's own size."""
    size = images.shape[-2:]
    crop = [math.ceil(side / factor) for side in size]
    top, left = ((side - kept) // 2 for side, kept in zip(size, crop, strict=True))
    centre = images[..., top : top + crop[0], left : left + crop[1]]
    larger = [round(kept * factor) for kept in crop]
    enlarged = F.interpolate(centre, size=larger, mode="bilinear", align_corners=True)
    top, left = ((side - kept) // 2 for side, kept in zip(larger, size, strict=True))
    return enlarged[..., top : top + size[0], left : left + size[1]]


def sample(images: Tensor, rows: Tensor, columns: Tensor, *, border: Literal["mirror", "reflect"]) -> Tensor:
    """The images at fractional positions, bilinearly.

    Args:
        images: ``(batch, C, H, W)``.
        rows: ``(batch, H, W)``, the row that each pixel is taken from.
        columns: ``(batch, H, W)``, likewise.
        border: ``mirror`` mirrors at the centre of the outermost pixel, ``reflect`` at its outer edge; scipy's names.
    """
    height, width = images.shape[-2:]
    if border == "mirror":
        where = [2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1]
    else:
        where = [(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1]
    grid = torch.stack(where, dim=-1)
    return F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=border == "mirror"
    )
