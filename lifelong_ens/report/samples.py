"""A few test images of every task, kept beside the records of a comparison as one picture.

``samples/<setting>-<seed>.png`` has a row of images for each task, all images of one size. The seed is part of the
name because it chooses the order of classes.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lifelong_ens.store import write_bytes

if TYPE_CHECKING:
    import numpy as np

FOLDER = "samples"
PER_TASK = 5
_SIDES = 24, 48
"""Pixels of the longer side: smaller images are repeated pixel by pixel, larger ones made small."""


class Strip(NamedTuple):
    """The images of one task as a PNG file, of so many pixels."""

    png: bytes
    width: int
    height: int


def has_samples(out: str | os.PathLike[str], setting: str) -> bool:
    """Whether a comparison has its picture."""
    return any((Path(out) / FOLDER).glob(f"{setting}-*.png"))


def write_samples(out: str | os.PathLike[str], setting: str, seed: int, images: np.ndarray) -> Path:
    """Write the picture of a comparison.

    Args:
        out: Its folder.
        setting: Of the comparison.
        seed: That the images were drawn with.
        images: ``(tasks, images, C, H, W)`` of any scale; the smallest value becomes black, the largest white.
    """
    import numpy as np
    from PIL import Image

    low, high = float(images.min()), float(images.max())
    scaled = np.round(255 * (images - low) / max(high - low, 1e-12)).astype(np.uint8)
    tasks, count, channels, height, width = scaled.shape
    rows = scaled.transpose(0, 3, 1, 4, 2).reshape(tasks * height, count * width, channels)
    picture = Image.fromarray(rows[:, :, 0] if channels != 3 else rows)
    least, most = _SIDES
    side = max(height, width)
    factor = -(-least // side) if side < least else min(most / side, 1)
    size = (count * max(round(width * factor), 1), tasks * max(round(height * factor), 1))
    picture = picture.resize(size, Image.Resampling.BOX)
    path = Path(out) / FOLDER / f"{setting}-{seed}.png"
    write_bytes(path, _png(picture))
    return path


def read_samples(out: str | os.PathLike[str], setting: str, num_tasks: int) -> tuple[int, list[Strip]] | None:
    """The seed and a strip for each task; None where there is no picture or it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    for path in sorted((Path(out) / FOLDER).glob(f"{setting}-*.png")):
        try:
            with Image.open(path) as picture:
                height = picture.height // num_tasks
                parts = [
                    picture.crop((0, t * height, picture.width, (t + 1) * height)) for t in range(num_tasks)
                ]
                return int(path.stem.rpartition("-")[2]), [Strip(_png(one), *one.size) for one in parts]
        except (UnidentifiedImageError, OSError, ValueError):
            continue
    return None


def _png(picture: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)  # pyright: ignore[reportAttributeAccessIssue]
    return buffer.getvalue()
