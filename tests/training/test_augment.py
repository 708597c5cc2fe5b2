from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_ens.training.augment import augment

PADDING = 2


def images(batch: int = 400, size: tuple[int, int] = (6, 5)) -> Tensor:
    """Every pixel of every image has a value of its own, so that a match can be no accident."""
    return torch.arange(1, 1 + batch * 3 * size[0] * size[1]).float().view(batch, 3, *size)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def candidates(image: Tensor, padding: int) -> dict[tuple[bool, int, int], Tensor]:
    """All that may become of one image ``(C, H, W)``, by plain slicing."""
    _, height, width = image.shape
    found = {}
    for flip, top, left in itertools.product((False, True), range(2 * padding + 1), range(2 * padding + 1)):
        crop = F.pad(image, [padding] * 4)[:, top : top + height, left : left + width]
        found[flip, top, left] = crop.flip(-1) if flip else crop
    return found


def test_no_augmentation_is_the_batch_itself() -> None:
    batch = images(3)
    assert augment(batch, "none", generator()) is batch


def test_flips_mirror_half_of_the_images() -> None:
    batch = images()
    out = augment(batch, "flip", generator())
    flipped = 0
    for image, result in zip(batch, out, strict=True):
        if torch.equal(result, image.flip(-1)):
            flipped += 1
        else:
            assert torch.equal(result, image)
    assert 160 < flipped < 240


def test_crops_are_shifted_and_flipped_copies_with_zeros_beyond_the_border() -> None:
    batch = images()
    out = augment(batch, "crop_flip", generator(), PADDING)
    assert out.shape == batch.shape
    chosen = []
    for image, result in zip(batch, out, strict=True):
        matches = [key for key, crop in candidates(image, PADDING).items() if torch.equal(crop, result)]
        assert len(matches) == 1
        chosen += matches
    assert len(set(chosen)) == 2 * (2 * PADDING + 1) ** 2  # all of them come up
    assert 160 < sum(flip for flip, _, _ in chosen) < 240
    for axis in (1, 2):
        mean = sum(key[axis] for key in chosen) / len(chosen)
        assert mean == pytest.approx(PADDING, abs=0.25)


def test_four_pixels_unless_told_otherwise() -> None:
    image = images(1, (12, 12)).expand(300, -1, -1, -1)
    out = augment(image, "crop_flip", generator())
    shifts = {
        key[1:] for key, crop in candidates(image[0], 4).items() if (out == crop).flatten(1).all(1).any()
    }
    assert {top for top, _ in shifts} == {left for _, left in shifts} == set(range(9))


@pytest.mark.parametrize("kind", ["flip", "crop_flip"])
def test_the_generator_decides(kind: str) -> None:
    batch = images(50)
    out = augment(batch, kind, generator(1))  # type: ignore[arg-type]
    torch.manual_seed(77)
    state = torch.get_rng_state()
    assert torch.equal(augment(batch, kind, generator(1)), out)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(augment(batch, kind, generator(2)), out)  # type: ignore[arg-type]
    one = generator(1)
    first, second = (augment(batch, kind, one) for _ in range(2))  # type: ignore[arg-type]
    assert torch.equal(first, out)
    assert not torch.equal(second, out)


def test_the_batch_given_is_not_changed() -> None:
    batch = images(20)
    augment(batch, "crop_flip", generator())
    assert torch.equal(batch, images(20))
