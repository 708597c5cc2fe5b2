from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lifelong_ens.corruptions import digital, tables

IMAGES = torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.to(torch.uint8).permute(1, 2, 0).numpy()) for image in images]


def stacked(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float()


def test_contrast_is_of_each_channel() -> None:
    means = IMAGES.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(digital.contrast(IMAGES, seeded(), 0.3), means + 0.3 * (IMAGES - means))


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (33, 47), (64, 64)])
@pytest.mark.parametrize("factor", [0.95, 0.9, 0.85, 0.75, 0.65, 0.5, 0.25])
def test_pixelate_equals_pillow(size: tuple[int, int], factor: float) -> None:
    height, width = size
    images = torch.randint(256, (1, 3, height, width), generator=seeded()).float()
    small = (int(width * factor), int(height * factor))
    theirs = [
        picture.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)
        for picture in pictures(images)
    ]
    distance = (digital.pixelate(images, seeded(), factor) - stacked(theirs)).abs()
    assert distance.max() <= 1  # halves, which Pillow's integer weights put on either side
    assert (distance > 0).float().mean() < 0.02


@pytest.mark.parametrize("quality", [80, 40, 7])
def test_jpeg_equals_pillow(quality: int) -> None:
    def through(picture: Image.Image) -> Image.Image:
        stored = io.BytesIO()
        picture.save(stored, "JPEG", quality=quality)
        return Image.open(stored)

    theirs = stacked([through(picture) for picture in pictures(IMAGES)])
    ours = digital.jpeg_compression(IMAGES, seeded(), quality)
    # two builds of the codec may round differently; the images are noise, so that quality shows
    assert (ours - theirs).abs().mean() < 0.5


def test_elastic_without_displacements_is_affine() -> None:
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    plane = (2 * rows + 3 * columns + 20).repeat(5, 1, 1, 1)
    moved = digital.elastic_transform(plane, seeded(), 0, 0, 0.08)[:, 0, 8:24, 8:24]
    # an affine map of a plane is a plane: second differences vanish, the first change
    for dimension in (1, 2):
        assert moved.diff(n=2, dim=dimension).abs().max() < 1e-2
    assert (moved - plane[:, 0, 8:24, 8:24]).abs().amax(dim=(1, 2)).min() > 1


def test_the_affine_map_sends_its_corners_where_they_are_drawn() -> None:
    rows, columns = digital._affine_source(IMAGES, seeded(), 2.5)
    corners = torch.tensor([[26, 26], [26, 6], [6, 6]])
    moved = corners + torch.rand(2, 3, 2, generator=seeded()) * 5 - 2.5
    for image in range(2):
        for (x, y), (new_x, new_y) in zip(corners.tolist(), moved[image].tolist(), strict=True):
            # the maps are affine: read them between pixels from their values at three
            for source, expected in ((columns[image], x), (rows[image], y)):
                right, down = source[0, 1] - source[0, 0], source[1, 0] - source[0, 0]
                assert (source[0, 0] + right * new_x + down * new_y).item() == pytest.approx(
                    expected, abs=1e-3
                )


def test_displacements_scale_with_the_image() -> None:
    rows = torch.arange(64.0)[:, None].expand(20, 1, 64, 64).contiguous()
    moved = [
        (digital.elastic_transform(images, seeded(), *tables.CIFAR["elastic_transform"][4]) - images)
        .square()
        .mean()
        .sqrt()
        .item()
        for images in (rows[..., :32, :32], rows)
    ]
    assert moved[1] == pytest.approx(2 * moved[0], rel=0.3)
