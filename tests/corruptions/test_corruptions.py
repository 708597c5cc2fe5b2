from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from lifelong_ens.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corrupted_sets, tables
from lifelong_ens.errors import InputError

DETERMINISTIC = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(batch: int = 4, channels: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """Images with structure at several scales, as photographs have."""
    coarse = torch.rand(batch, channels, 4, 4, generator=seeded(seed))
    fine = torch.rand(batch, channels, 8, 8, generator=seeded(seed + 1))
    up = [
        torch.nn.functional.interpolate(part, size=(height, width), mode="bicubic", align_corners=False)
        for part in (coarse, fine)
    ]
    return (255 * (0.7 * up[0] + 0.3 * up[1])).clamp(0, 255).to(torch.uint8)


def test_names_and_tables_agree() -> None:
    assert len(CORRUPTIONS) == 15
    for table in (tables.CIFAR, tables.TINY_IMAGENET, tables.IMAGENET):
        assert tuple(table) == CORRUPTIONS
        assert all(len(entries) == 5 for entries in table.values())


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (8, 300, "CIFAR"),
        (28, 28, "CIFAR"),
        (32, 32, "CIFAR"),
        (33, 64, "TINY_IMAGENET"),
        (224, 65, "IMAGENET"),
    ],
)
def test_the_shorter_side_chooses_the_table(height: int, width: int, expected: str) -> None:
    assert tables.table(height, width) is getattr(tables, expected)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 40, 64), (3, 9, 17), (3, 80, 70)])
def test_shape_range_seed_and_input(name: str, shape: tuple[int, int, int]) -> None:
    images = smooth(2, *shape)
    before = images.clone()
    for severity in SEVERITIES:
        first, again = (corrupt(images, name, severity, seeded()) for _ in range(2))
        assert first.shape == images.shape
        assert first.dtype == torch.uint8
        assert torch.equal(first, again)
        if severity == 5:
            assert not torch.equal(first, images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in DETERMINISTIC])
def test_images_of_a_batch_differ_and_so_do_seeds(name: str) -> None:
    same = smooth(1).repeat(3, 1, 1, 1)
    first = corrupt(same, name, 5, seeded())
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, corrupt(same, name, 5, seeded(1)))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_batch_is_its_images_one_by_one(name: str) -> None:
    images = smooth(3)
    together = corrupt(images, name, 3, seeded())
    for image, expected in zip(images, together, strict=True):
        assert torch.equal(corrupt(image[None], name, 3, seeded(9))[0], expected)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_grey_images_behave_as_colour_images_without_colour(name: str) -> None:
    grey = smooth(60, channels=1)
    colour = grey.repeat(1, 3, 1, 1)
    changed = [
        (corrupt(images, name, 3, seeded()).float() - images).square().mean().item()
        for images in (grey, colour)
    ]
    assert changed[0] == pytest.approx(changed[1], rel=0.3)
    if name in DETERMINISTIC and name != "jpeg_compression":
        assert torch.equal(
            corrupt(grey, name, 3, seeded()).repeat(1, 3, 1, 1), corrupt(colour, name, 3, seeded())
        )


@pytest.mark.parametrize(
    "name",
    ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "elastic_transform", "pixelate"],
)
def test_what_only_moves_values_keeps_constant_images(name: str) -> None:
    """No level is lost to rounding: a float32 mean of equal numbers may fall below a whole one."""
    images = torch.arange(0, 256, 3, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 32, 32)
    for severity in SEVERITIES:
        assert torch.equal(corrupt(images, name, severity, seeded()), images)


def test_many_images_go_in_parts_of_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth(5)
    whole = corrupt(images, "zoom_blur", 2, seeded())
    monkeypatch.setattr("lifelong_ens.corruptions._VALUES_AT_ONCE", 2 * 3 * 32 * 32)
    assert torch.equal(corrupt(images, "zoom_blur", 2, seeded()), whole)
    monkeypatch.setattr("lifelong_ens.corruptions._VALUES_AT_ONCE", 1)
    assert torch.equal(corrupt(images, "zoom_blur", 2, seeded()), whole)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_images(name: str) -> None:
    assert corrupt(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), name, 1, seeded()).shape == (0, 3, 32, 32)


def test_sets_do_not_depend_on_which_are_asked_for() -> None:
    images = smooth(2)
    every = {(name, severity): done for name, severity, done in corrupted_sets(images, seed=3)}
    assert len(every) == 75
    [(name, severity, alone)] = corrupted_sets(images, seed=3, names=["fog"], severities=[4])
    assert torch.equal(alone, every[name, severity])
    [(_, _, other)] = corrupted_sets(images, seed=4, names=["fog"], severities=[4])
    assert not torch.equal(alone, other)


def test_bad_input_is_refused_in_one_line() -> None:
    images = smooth(1)
    with pytest.raises(InputError, match="did you mean gaussian_noise"):
        corrupt(images, "gausian_noise", 1, seeded())
    with pytest.raises(InputError, match="fogg"):
        list(corrupted_sets(images, names=["fogg"]))
    for severity in (0, 6):
        with pytest.raises(InputError, match="1 to 5"):
            corrupt(images, "fog", severity, seeded())
    with pytest.raises(ValueError, match="uint8"):
        corrupt(images.float(), "fog", 1, seeded())
    for shape in ((3, 32, 32), (1, 2, 32, 32), (1, 3, 7, 32)):
        with pytest.raises(ValueError, match="expected"):
            corrupt(torch.zeros(shape, dtype=torch.uint8), "fog", 1, seeded())


def mean_squared_distances(images: Tensor, name: str) -> list[float]:
    # the same seed for every severity: the same directions, flakes and offsets
    return [
        (corrupt(images, name, severity, seeded()).float() - images).square().mean().item()
        for severity in SEVERITIES
    ]


# with the published constants a later severity of these is not always farther from the image: glass of fewer blurs,
# frost that covers less, an affine map that moves less
MONOTONE = [name for name in CORRUPTIONS if name not in ("glass_blur", "frost", "elastic_transform")]


# 8x8 pixels are too few for the others: one block of JPEG, a grid of 7 boxes worse than one of 6, a dozen flakes
@pytest.mark.parametrize(
    "name", [name for name in MONOTONE if name not in ("jpeg_compression", "pixelate", "snow")]
)
def test_severity_grows_the_distance_on_digits(name: str) -> None:
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images[:400]).mul(255 / 16).to(torch.uint8)[:, None]
    distances = mean_squared_distances(digits, name)
    # equal where the constants differ in what does not reach so far, as (6, 2) and (8, 2) of motion blur
    assert all(a <= 1.001 * b for a, b in pairwise(distances)), distances
    assert distances[4] > 1.5 * distances[0]


@pytest.mark.data
@pytest.mark.parametrize("name", MONOTONE)
def test_severity_grows_the_distance_on_cifar(name: str, unpacked) -> None:
    from PIL import Image

    files = sorted((unpacked("cifar100") / "test").glob("*/*.png"))[::5]
    images = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2)
    distances = mean_squared_distances(images.contiguous(), name)
    assert all(a <= 1.001 * b for a, b in pairwise(distances)), distances
    assert distances[4] > 1.5 * distances[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_generator_of_the_cpu_draws_the_same_for_a_gpu(name: str) -> None:
    images = smooth(2)
    here, there = corrupt(images, name, 3, seeded()), corrupt(images.cuda(), name, 3, seeded())
    assert (here.int() - there.cpu().int()).abs().max() <= 1
