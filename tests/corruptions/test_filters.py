from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from lifelong_ens.corruptions import filters

IMAGES = 255 * torch.rand(2, 3, 12, 17, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.5, 9.0])
@pytest.mark.parametrize(("border", "truncate"), [("nearest", 4), ("reflect", 3)])
def test_gaussian_equals_scipy(sigma: float, border, truncate: float) -> None:
    ours = filters.gaussian_blur(IMAGES, sigma, truncate=truncate, border=border)
    theirs = ndimage.gaussian_filter(
        IMAGES.double().numpy(), sigma, axes=(2, 3), mode=border, truncate=truncate
    )
    torch.testing.assert_close(ours, torch.from_numpy(theirs), check_dtype=False, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("factor", [1, 1.01, 1.06, 1.25, 1.75, 3, 4.5])
@pytest.mark.parametrize("size", [8, 32, 33])
def test_zoom_equals_scipy(factor: float, size: int) -> None:
    image = IMAGES.new_empty(size, size).uniform_(0, 255, generator=torch.Generator().manual_seed(1))
    kept = math.ceil(size / factor)
    top = (size - kept) // 2
    larger = ndimage.zoom(image.double().numpy()[top : top + kept, top : top + kept], factor, order=1)
    trim = (len(larger) - size) // 2
    expected = torch.from_numpy(larger[trim : trim + size, trim : trim + size].copy())
    ours = filters.zoom(image[None, None], factor)[0, 0]
    torch.testing.assert_close(ours, expected, check_dtype=False, rtol=0, atol=0.01)


@pytest.mark.parametrize("border", ["mirror", "reflect"])
def test_sampling_equals_scipy(border) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.rand(2, 12, 17, generator=generator) * 24 - 6
    columns = torch.rand(2, 12, 17, generator=generator) * 30 - 6
    ours = filters.sample(IMAGES, rows, columns, border=border)
    for image, r, c, found in zip(IMAGES.double(), rows, columns, ours, strict=True):
        for channel, result in zip(image, found, strict=True):
            theirs = ndimage.map_coordinates(channel.numpy(), np.stack([r, c]), order=1, mode=border)
            torch.testing.assert_close(result, torch.from_numpy(theirs), check_dtype=False, rtol=0, atol=0.01)


def test_motion_blur_of_a_point_is_its_kernel_backwards() -> None:
    point = torch.zeros(4, 1, 21, 21)
    point[:, :, 10, 10] = 1
    taps = torch.exp(-0.5 * (torch.arange(7) / 2.0) ** 2)
    taps /= taps.sum()
    blurred = filters.motion_blur(point, 3, 2, torch.tensor([0.0, 90.0, -90.0, 180.0]))[:, 0]
    torch.testing.assert_close(blurred[0, 10, 4:11], taps.flip(0))  # the pixel looks to the right
    torch.testing.assert_close(blurred[1, 4:11, 10], taps.flip(0))  # down
    torch.testing.assert_close(blurred[2, 10:17, 10], taps)  # up
    torch.testing.assert_close(blurred[3, 10, 10:17], taps)  # to the left
    torch.testing.assert_close(blurred.sum((1, 2)), torch.ones(4))


def test_motion_blur_equals_a_loop_over_pixels() -> None:
    angle, radius, sigma = 33.0, 4, 1.7
    kernel = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    expected = torch.zeros(12, 17)
    for y in range(12):
        for x in range(17):
            for i, weight in enumerate(kernel):
                right = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
                down = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
                source = IMAGES[0, 0, min(max(y + down, 0), 11), min(max(x + right, 0), 16)]
                expected[y, x] += weight / sum(kernel) * source
    ours = filters.motion_blur(IMAGES[:1, :1], radius, sigma, torch.tensor([angle]))[0, 0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0.01)
