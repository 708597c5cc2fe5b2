"""Small real and made-up image sets, and a cache folder of the test's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "image_cache"
    monkeypatch.setenv("LIFELONG_ENS_CACHE", str(folder))
    return folder


def save_image(path: Path, seed: int, size=(8, 8), mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode in ("RGB", "CMYK") else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(pixels)
    (image if image.mode == mode else image.convert(mode)).save(path)


@pytest.fixture
def write_image():
    """Returns the function that saves an image of random pixels."""
    return save_image


@pytest.fixture
def class_folders(tmp_path):
    """Train and test folders: 5 classes, 6 training and 2 test images of 8x8 each."""
    root = tmp_path / "images"
    for number, name in enumerate(["ant", "bee", "cat", "dog", "elk"]):
        for part, count in (("train", 6), ("test", 2)):
            for i in range(count):
                save_image(root / part / name / f"{i}.png", 1000 * number + 10 * i + (part == "test"))
    return root
