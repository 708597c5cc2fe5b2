"""Noise. Images are float ``(batch, C, H, W)`` in [0, 255]; results may leave that range."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lifelong_ens.corruptions.draws import normal, uniform


def gaussian_noise(images: Tensor, generator: Generator, scale: float) -> Tensor:
    """Adds normal noise with the standard deviation ``255 * scale``."""
    return images + 255 * scale * normal(images.shape, generator, images)


def shot_noise(images: Tensor, generator: Generator, photons: float) -> Tensor:
    """Counts the photons of a Poisson process, of which a white pixel sends ``photons`` on average."""
    expected = (images * (photons / 255)).to(generator.device)
    return torch.poisson(expected, generator=generator).to(images) * (255 / photons)


def impulse_noise(images: Tensor, generator: Generator, amount: float) -> Tensor:
    """Salt and pepper: this share of the values, channel by channel, becomes 0 or 255 with equal probability."""
    hit = uniform(images.shape, generator, images) < amount
    salt = uniform(images.shape, generator, images) < 0.5
    return torch.where(hit, 255 * salt.to(images), images)
