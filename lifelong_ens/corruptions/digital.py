"""Contrast, distortion and lossy storage. Images are float ``(batch, C, H, W)`` in [0, 255]."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lifelong_ens.corruptions import filters
from lifelong_ens.corruptions.draws import uniform


def contrast(images: Tensor, generator: Generator, factor: float) -> Tensor:
    """Each channel's distance from its mean over the image times ``factor``."""
    means = images.mean(dim=(2, 3), keepdim=True)
    return (images - means) * factor + means


def elastic_transform(
    images: Tensor, generator: Generator, amplitude: float, sigma: float, affine: float
) -> Tensor:
    """A random affine map, then a smooth random displacement of every pixel.

    Args:
        images: See above.
        generator: Source of both.
        amplitude: Of the displacements, before they are smoothed, in parts of the shorter side.
        sigma: Standard deviation of the Gaussian that smooths the displacements, in parts of the shorter side.
        affine: The three points that define the affine map move by up to this, in parts of the shorter side.
    """
    batch, _, height, width = images.shape
    side = min(height, width)
    rows, columns = _affine_source(images, generator, affine * side)
    images = filters.sample(images, rows, columns, border="mirror")
    if amplitude == 0:
        return images
    moves = uniform((2, batch, height, width), generator, images, -1, 1)
    moves = amplitude * side * filters.gaussian_blur(moves, sigma * side, truncate=3, border="reflect")
    rows = torch.arange(height, device=images.device)[:, None] + moves[0]
    columns = torch.arange(width, device=images.device) + moves[1]
    return filters.sample(images, rows, columns, border="reflect")


def _affine_source(images: Tensor, generator: Generator, reach: float) -> tuple[Tensor, Tensor]:
    """Where a random affine map takes each pixel from: rows and columns, both ``(batch, H, W)``.

    The map sends three corners of a square about the centre, a third of the image to each side, to points up to
    ``reach`` pixels away in each coordinate.
    """
    batch, _, height, width = images.shape
    right, down, third = width // 2, height // 2, min(height, width) // 3
    corners = torch.tensor(
        [[right + third, down + third], [right + third, down - third], [right - third, down - third]],
        dtype=torch.float64,
    )
    moved = corners + uniform((batch, 3, 2), generator, corners, -reach, reach)
    # the inverse map: [x', y', 1] times its coefficients is [x, y]
    homogeneous = torch.cat([moved, torch.ones(batch, 3, 1, dtype=torch.float64)], dim=2)
    coefficients = torch.linalg.solve(homogeneous, corners.expand(batch, 3, 2)).to(images)[
        :, :, :, None, None
    ]
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    source = coefficients[:, 0] * columns + coefficients[:, 1] * rows + coefficients[:, 2]
    return source[:, 1], source[:, 0]


def pixelate(images: Tensor, generator: Generator, factor: float) -> Tensor:
    """Shrinks to ``int(factor * side)`` pixels and enlarges again, both with Pillow's box filter."""
    size = images.shape[-2:]
    small = [max(1, int(side * factor)) for side in size]
    for target in (small, size):
        for dimension in (3, 2):  # Pillow's order; it rounds to whole levels after each
            matrix = _box_matrix(images.shape[dimension], target[dimension - 2]).to(images)
            images = (images.transpose(dimension, 3) @ matrix.T).transpose(dimension, 3)
            images = (images + 0.5 + 1e-3).floor()
    return images


def _box_matrix(size: int, target: int) -> Tensor:
    """Pillow's box filter of a line of ``size`` pixels as a matrix ``(target, size)``.

    A pixel counts in whole or not at all, by whether its centre is in the box.
    """
    scale = size / target
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(size, dtype=torch.float64) + 0.5 - centres[:, None]) / max(scale, 1.0)
    inside = ((distance > -0.5) & (distance <= 0.5)).double()
    return inside / inside.sum(dim=1, keepdim=True)


def jpeg_compression(images: Tensor, generator: Generator, quality: float) -> Tensor:
    """What JPEG of this ``quality``, 1 to 100, leaves; colour at half the resolution, as is usual."""
    from torchvision.io import decode_jpeg, encode_jpeg

    left = torch.empty_like(images)
    for index, image in enumerate(images.to("cpu", torch.uint8)):
        left[index] = decode_jpeg(encode_jpeg(image, quality=int(quality)))  # pyright: ignore[reportArgumentType]
    return left
