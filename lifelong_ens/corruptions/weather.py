"""Weather. Images are float ``(batch, C, H, W)`` in [0, 255]; results may leave that range."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lifelong_ens.corruptions import filters
from lifelong_ens.corruptions.draws import integers, normal, uniform

_LUMINANCE = (0.299, 0.587, 0.114)

# measured on the five photographs of frost that the published code chooses from (it has a sixth, but never chooses it;
# two are alike): mean red, green and blue, and the standard deviation of brightness over a crop of 32 pixels
_PHOTOGRAPHS = (
    (0.305, 0.585, 0.650, 0.056),
    (0.787, 0.805, 0.841, 0.071),
    (0.787, 0.805, 0.841, 0.071),
    (0.540, 0.599, 0.648, 0.099),
    (0.441, 0.484, 0.528, 0.137),
)
# smoothed noise: the standard deviation in pixels of the photographs, and its share of the variance; together about the
# photographs' mean autocorrelation, 0.8, 0.5, 0.4 and 0.3 at 1, 4, 8 and 10 of their pixels
_GRAIN = ((0.7, 0.5), (6.0, 0.2), (25.0, 0.3))


def snow(
    images: Tensor,
    generator: Generator,
    mean: float,
    spread: float,
    size: float,
    threshold: float,
    radius: float,
    sigma: float,
    weight: float,
) -> Tensor:
    """Falling flakes over an image that is whiter.

    Args:
        images: See above.
        generator: Source of the flakes and of their direction, 45 to 135 degrees against the horizontal.
        mean: Of the normal numbers that become flakes.
        spread: Their standard deviation.
        size: Zoom factor of the flakes.
        threshold: Numbers below it are no flakes.
        radius: Of the flakes' motion blur, in pixels.
        sigma: Standard deviation of that blur, in pixels.
        weight: Of the image against the whiter one.
    """
    batch, _, height, width = images.shape
    flakes = filters.zoom(mean + spread * normal((batch, 1, height, width), generator, images), size)
    flakes = (torch.where(flakes < threshold, 0, flakes).clamp(0, 1) * 255).floor()
    angles = uniform((batch,), generator, images, -135, -45)
    flakes = filters.motion_blur(flakes, radius, sigma, angles).round()
    whiter = torch.maximum(images, 1.5 * _grey(images) + 127.5)
    return weight * images + (1 - weight) * whiter + flakes + flakes.flip(2, 3)


def frost(images: Tensor, generator: Generator, weight: float, frost_weight: float, scale: float) -> Tensor:
    """Ice on the window: ``weight * image + frost_weight * frost``.

    The published frost is a random crop of one of five photographs. There is no photograph here: the frost is drawn
    from noise with the mean colour, the contrast and the autocorrelation of those photographs, and with needles in the
    six directions of ice. It is as bright and as rough, but it is not the published picture; results with it compare
    with each other, and with published ones only roughly. For those read the official files (``read_cifar_c``).

    Args:
        images: See above.
        generator: Source of the frost.
        weight: Of the image.
        frost_weight: Of the frost.
        scale: Size of the frost relative to the photographs', which the published code shrinks for small images.
    """
    return weight * images + frost_weight * frost_texture(images, generator, scale)


def frost_texture(images: Tensor, generator: Generator, scale: float) -> Tensor:
    """Frost for each image, in [0, 255], of the shape of ``images``."""
    batch, channels, height, width = images.shape
    ice = torch.zeros(batch, 1, height, width).to(images)
    for sigma, share in _GRAIN:
        ice += share**0.5 * _needles((batch, height, width), generator, images, sigma * scale)
    photographs = torch.tensor(_PHOTOGRAPHS).to(images)[integers((batch,), generator, images, 0, 5)]
    colour = photographs[:, :3, None, None]
    if channels == 1:
        colour = _grey(colour)
    return ((colour + photographs[:, 3, None, None, None] * ice) * 255).clamp(0, 255)


def _needles(shape: tuple[int, int, int], generator: Generator, like: Tensor, sigma: float) -> Tensor:
    """Noise smoothed over ``sigma`` pixels along lines of three random directions 60 degrees apart.

    ``(batch, 1, H, W)``, of mean 0 and variance 1 in every image.
    """
    batch, height, width = shape
    shrunk = max(1.0, sigma)  # what is coarse is drawn small and enlarged
    sigma /= shrunk
    margin = math.ceil(6 * sigma)  # at the border the blurs repeat themselves, which would stand out
    small = (batch, 1, *(math.ceil(side / shrunk) + 2 * margin for side in (height, width)))
    first = uniform((batch,), generator, like, 0, 60)
    lines = []
    for turn in (0, 60, 120):
        noise = filters.gaussian_blur(normal(small, generator, like), 0.6 * sigma)
        lines.append(filters.motion_blur(noise, 6 * sigma, 3 * sigma, first + turn))
    needles = torch.stack(lines).amax(dim=0)[..., margin:-margin, margin:-margin]
    needles = F.interpolate(needles, size=(height, width), mode="bilinear", align_corners=False)
    needles -= needles.mean(dim=(2, 3), keepdim=True)
    return needles / needles.square().mean(dim=(2, 3), keepdim=True).sqrt().clamp_min(1e-12)


def fog(images: Tensor, generator: Generator, thickness: float, decay: float) -> Tensor:
    """Clouds in front of the image, which keeps its largest value.

    Args:
        images: See above.
        generator: Source of the clouds.
        thickness: Of the clouds; 1 adds up to 255.
        decay: How much smoother than coarse the fine structure of the clouds is, see ``plasma``.
    """
    _, _, height, width = images.shape
    clouds = plasma(images, generator, decay)[:, None, :height, :width]
    largest = images.amax(dim=(1, 2, 3), keepdim=True)
    return (images + 255 * thickness * clouds) * (largest / (largest + 255 * thickness))


def plasma(images: Tensor, generator: Generator, decay: float) -> Tensor:
    """A cloud for each image: a fractal made by the diamond-square rule, in [0, 1].

    ``(batch, S, S)`` with ``S`` the power of two that covers the image; the map is periodic. The noise of each level
    is uniform, ``decay ** 2`` times smaller than that of the level before.
    """
    batch, _, height, width = images.shape
    side = 1 << (max(height, width) - 1).bit_length()
    clouds = torch.zeros(batch, side, side).to(images)
    step, amplitude = (
        side,
        1e4,
    )  # far above the 0 of the first corner, as published; the scale goes in the end
    while step >= 2:
        half = step // 2
        corners = clouds[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        centres = _mean_of_four(pairs, pairs.roll(-1, 2), generator, amplitude)
        sideways = corners + corners.roll(-1, 2) + centres
        clouds[:, half::step, half::step] = centres
        clouds[:, ::step, half::step] = _mean_of_four(sideways, centres.roll(1, 1), generator, amplitude)
        downwards = corners + corners.roll(-1, 1) + centres
        clouds[:, half::step, ::step] = _mean_of_four(downwards, centres.roll(1, 2), generator, amplitude)
        step, amplitude = half, amplitude / decay**2
    clouds -= clouds.amin(dim=(1, 2), keepdim=True)
    return clouds / clouds.amax(dim=(1, 2), keepdim=True)


def _mean_of_four(some: Tensor, others: Tensor, generator: Generator, amplitude: float) -> Tensor:
    """The mean of four neighbours, given as two sums of theirs, with uniform noise."""
    return (some + others) / 4 + uniform(some.shape, generator, some, -amplitude, amplitude)


def brightness(images: Tensor, generator: Generator, amount: float) -> Tensor:
    """Adds ``255 * amount`` to the value of each pixel's hue, saturation and value, up to 255."""
    value = images.amax(dim=1, keepdim=True)
    brighter = (value + 255 * amount).clamp_max(255)
    # hue and saturation are kept where all channels grow alike; black has neither and becomes grey
    return torch.where(value > 0, images * (brighter / value.clamp_min(1)), brighter)


def _grey(images: Tensor) -> Tensor:
    """Luminance, ``(batch, 1, H, W)``; grey images as they are."""
    if images.shape[1] == 1:
        return images
    return (images * torch.tensor(_LUMINANCE).to(images)[:, None, None]).sum(dim=1, keepdim=True)
