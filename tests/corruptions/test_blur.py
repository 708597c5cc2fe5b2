from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from lifelong_ens.corruptions import blur, filters, tables

IMAGES = torch.randint(256, (2, 3, 20, 23), generator=torch.Generator().manual_seed(0)).float()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_copies_what_a_loop_over_pixels_copies(reach: int) -> None:
    ours = blur.glass_blur(IMAGES, seeded(), 0.05, reach, 1)
    generator, shape = seeded(), (2, 20, 23)
    down, right = (torch.randint(-reach, reach, shape, generator=generator) for _ in range(2))
    for image, dy, dx, found in zip(IMAGES, down, right, ours, strict=True):
        pixels = image.permute(1, 2, 0).numpy().copy()
        for y in range(20 - reach, reach, -1):
            for x in range(23 - reach, reach, -1):
                a, b = (y, x), (y + int(dy[y, x]), x + int(dx[y, x]))
                pixels[a], pixels[b] = pixels[b], pixels[a]  # of views: copies the second to the first
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), pixels)


def test_glass_blurs_before_and_after() -> None:
    ours = blur.glass_blur(IMAGES, seeded(), 0.7, 1, 1)
    before = filters.gaussian_blur(IMAGES, 0.7).floor()
    moved = blur.glass_blur(before, seeded(), 0.05, 1, 1)
    torch.testing.assert_close(ours, filters.gaussian_blur(moved, 0.7))


@pytest.mark.parametrize("table", [tables.CIFAR, tables.TINY_IMAGENET, tables.IMAGENET])
def test_disks_are_normalised_symmetric_and_cut_to_what_they_cover(table: tables.Table) -> None:
    for radius, alias_blur in table["defocus_blur"]:
        kernel = blur.disk(radius, alias_blur)
        # above 1 where the disk touches the frame in which the published code smooths it, mirrored at its border
        assert 1 - 1e-9 < kernel.sum().item() < 1.02
        torch.testing.assert_close(kernel, kernel.T)
        torch.testing.assert_close(kernel, kernel.flip(0))
        assert kernel.shape[0] % 2 == 1
        assert kernel.shape[0] // 2 <= int(radius) + 2


def test_disk_of_radius_1_is_a_smoothed_cross() -> None:
    cross = np.zeros((7, 7))
    cross[2:5, 3] = cross[3, 2:5] = 0.2
    expected = ndimage.gaussian_filter(cross, 0.5, radius=1)[1:-1, 1:-1]
    np.testing.assert_allclose(blur.disk(1, 0.5).numpy(), expected, atol=1e-12)


def test_defocus_equals_scipy() -> None:
    ours = blur.defocus_blur(IMAGES, seeded(), 3, 0.5)
    kernel = blur.disk(3, 0.5).numpy()
    theirs = ndimage.correlate(IMAGES.double().numpy(), kernel[None, None], mode="mirror")
    torch.testing.assert_close(ours, torch.from_numpy(theirs), check_dtype=False, rtol=0, atol=0.01)


def test_zoom_blur_is_the_mean_with_the_image_once_more() -> None:
    ours = blur.zoom_blur(IMAGES, seeded(), 1.0, 1.2)
    expected = (2 * IMAGES + filters.zoom(IMAGES, 1.2)) / 3
    torch.testing.assert_close(ours, expected)


def test_motion_blur_stays_within_45_degrees_of_the_horizontal() -> None:
    point = torch.zeros(200, 1, 21, 21)
    point[:, :, 10, 10] = 1000
    rows, columns = blur.motion_blur(point, seeded(), 6, 2)[:, 0].nonzero()[:, 1:].unbind(1)
    assert (columns <= 10).all()
    assert ((rows - 10).abs() <= 10 - columns).all()
    assert (rows < 10).any()
    assert (rows > 10).any()
