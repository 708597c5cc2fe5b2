"""Image files and arrays of images brought to one layout and size, in training and in serving alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

from lifelong_ens.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
_CHUNK = 1024


def is_hidden(name: str) -> bool:
    """Whether a file or folder is there for a file manager and not for the user."""
    return name.startswith(".") or name == "__MACOSX"


def find_images(folder: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    """The image files in a folder and in folders below it, by name; what is hidden is left out."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield from find_images(entry.path)
        elif entry.name.lower().endswith(EXTENSIONS):
            yield entry


def resize(images: np.ndarray, size: int | tuple[int, int] | None) -> np.ndarray:
    """Images uint8 ``(n, C, H, W)`` at ``size``, a side or ``(H, W)``, antialiased; ``None`` keeps them."""
    if size is None:
        return images
    target = (size, size) if isinstance(size, int) else size
    if images.shape[2:] == target:
        return images
    resized = np.empty((*images.shape[:2], *target), dtype=np.uint8)
    for start in range(0, len(images), _CHUNK):
        chunk = torch.from_numpy(np.ascontiguousarray(images[start : start + _CHUNK])).float()
        chunk = interpolate(chunk, target, mode="bilinear", antialias=True)
        resized[start : start + _CHUNK] = chunk.round().clamp(0, 255).byte().numpy()
    return resized


def read_image(
    path: str,
    image_size: int | None,
    crop_margin: float = 1.0,
    *,
    channels: int = 3,
    content: bytes | None = None,
) -> np.ndarray:
    """One file, uint8 ``(channels, H, W)``, upright, and if a size is given resized and cropped to it.

    Args:
        path: Anything that Pillow decodes.
        image_size: Height and width; ``None`` keeps the image's own.
        crop_margin: The short side is resized to ``image_size * crop_margin`` before the centre is cropped.
        channels: 3 for RGB, 1 for grey.
        content: What stands in the file, where that was read already; ``path`` then only names it.

    Raises:
        InputError: The file cannot be decoded.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        with Image.open(path if content is None else BytesIO(content)) as opened:
            if image_size is not None:
                # JPEG can be decoded at a fraction of its size; twice the wanted one keeps resizing exact
                wanted = round(2 * image_size * crop_margin)
                opened.draft(mode, (wanted, wanted))
            image = _to_mode(ImageOps.exif_transpose(opened), mode)
        if image_size is not None:
            image = _fit(image, image_size, crop_margin)
    # PIL's readers let many kinds of error through on damaged files
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be decoded ({reason}); replace or remove this image") from None
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def crop_to_shape(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The largest centre of an image ``(C, H, W)`` whose sides have the ratio of ``shape``, ``(H, W)``."""
    height, width = image.shape[1:]
    kept_height = min(height, max(round(width * shape[0] / shape[1]), 1))
    kept_width = min(width, max(round(height * shape[1] / shape[0]), 1))
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return image[:, top : top + kept_height, left : left + kept_width]


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError("it holds fractions, whose white is unknown: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        # 16-bit grey: PIL's own conversion clips instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    return image.convert(mode)


def _fit(image: Image.Image, size: int, crop_margin: float) -> Image.Image:
    """Resize the short side to ``size * crop_margin`` and crop the centre ``size`` x ``size``."""
    short = round(size * crop_margin)
    width, height = image.size
    scale = short / min(width, height)
    target = (max(short, round(width * scale)), max(short, round(height * scale)))
    if target != image.size:
        image = image.resize(target, Image.Resampling.BILINEAR)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    return image.crop((left, top, left + size, top + size))
