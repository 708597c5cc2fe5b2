"""Blur. Images are float ``(batch, C, H, W)`` in [0, 255]; results may leave that range by rounding errors."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lifelong_ens.corruptions import filters
from lifelong_ens.corruptions.draws import integers, uniform


def defocus_blur(images: Tensor, generator: Generator, radius: float, alias_blur: float) -> Tensor:
    """A lens out of focus: the mean over a disk.

    Args:
        images: See above.
        generator: Not used.
        radius: Of the disk, in pixels.
        alias_blur: Standard deviation in pixels of a Gaussian, of 3x3 taps or for a radius above 8 of 5x5, that
            smooths the disk's rim.
    """
    kernel = disk(radius, alias_blur).to(images)
    reach = len(kernel) // 2
    planes = images.flatten(0, 1)[:, None]
    padded = F.pad(planes, (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(padded, kernel[None, None]).view_as(images)


def disk(radius: float, alias_blur: float) -> Tensor:
    """The smoothed disk, a square kernel of sum 1, no larger than it needs to be."""
    reach, smoothing = (8, 1) if radius <= 8 else (int(radius), 2)
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    inside = (steps[:, None] ** 2 + steps**2 <= radius**2).double()
    taps = torch.exp(-0.5 * (torch.arange(-smoothing, smoothing + 1, dtype=torch.float64) / alias_blur) ** 2)
    taps /= taps.sum()
    padded = F.pad((inside / inside.sum())[None, None], (smoothing,) * 4, mode="reflect")
    smooth = F.conv2d(padded, torch.outer(taps, taps)[None, None])[0, 0]
    empty = max(0, reach - math.floor(radius) - smoothing)
    return smooth[empty : len(smooth) - empty, empty : len(smooth) - empty]


def glass_blur(images: Tensor, generator: Generator, sigma: float, reach: float, times: float) -> Tensor:
    """Frosted glass: pixels taken from nearby, between two Gaussian blurs.

    The published loop means to swap each pixel with a random neighbour; its swap of two numpy views *copies* the
    neighbour instead, and so the published files were made. Here it copies too, in the same order.

    Args:
        images: See above.
        generator: Source of the offsets, -reach ... reach - 1 in both directions.
        sigma: Standard deviation of the blurs, in pixels.
        reach: How far away a neighbour may be, in pixels.
        times: How often the pixels move.
    """
    moved = filters.gaussian_blur(images, sigma).add(1e-3).floor()
    for _ in range(int(times)):
        moved = _copy_neighbours(moved, generator, int(reach))
    return filters.gaussian_blur(moved, sigma)


def _copy_neighbours(images: Tensor, generator: Generator, reach: int) -> Tensor:
    """Every pixel becomes a copy of a neighbour, one pixel after the other from the last to the first.

    What a pixel copies may itself be a copy already, where the neighbour comes after it in the image. That is a
    pointer to the neighbour's own source, and all chains of pointers are followed at once, each step doubling its
    length.
    """
    batch, _, height, width = images.shape
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    moves = (
        ((rows > reach) & (rows <= height - reach))[:, None] & (columns > reach) & (columns <= width - reach)
    )
    down, right = (integers((batch, height, width), generator, images, -reach, reach) for _ in range(2))
    here = rows[:, None] * width + columns
    source = torch.where(moves, here + down * width + right, here).flatten(1)
    here, moves = here.flatten(), moves.flatten()
    # 0 ... n-1: the pixel's value after its turn; n ... 2n-1: its value before, where a chain ends
    after = moves[source] & (source > here)
    pointers = torch.where(after, source, source + len(here))
    old = (here + len(here)).expand(batch, -1)
    while (pointers < len(here)).any():
        pointers = torch.cat([pointers, old], dim=1).gather(1, pointers)
    index = (pointers - len(here))[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, index).view_as(images)


def motion_blur(images: Tensor, generator: Generator, radius: float, sigma: float) -> Tensor:
    """The camera moves, at -45 to 45 degrees to the horizontal; see ``filters.motion_blur``."""
    angles = uniform(images.shape[:1], generator, images, -45, 45)
    return filters.motion_blur(images, radius, sigma, angles).round()


def zoom_blur(images: Tensor, generator: Generator, *factors: float) -> Tensor:
    """The camera comes nearer: the mean of the image and of itself at each of the zoom ``factors``."""
    total = images.clone()
    for factor in factors:
        total += filters.zoom(images, factor)
    return total / (len(factors) + 1)
