"""The 15 corruptions x 5 severities of Hendrycks & Dietterich 2019, for batches of images of any size from 8x8.

The constants are the published ones, see ``lifelong_ens.corruptions.tables``; ``frost`` is drawn, not photographed.
``read_cifar_c`` in ``lifelong_ens.corruptions.cifar_c`` reads the official files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from lifelong_ens.corruptions import blur, digital, noise, tables, weather
from lifelong_ens.errors import InputError, nearest

_FUNCTIONS = {
    function.__name__: function
    for function in (
        noise.gaussian_noise,
        noise.shot_noise,
        noise.impulse_noise,
        blur.defocus_blur,
        blur.glass_blur,
        blur.motion_blur,
        blur.zoom_blur,
        weather.snow,
        weather.frost,
        weather.fog,
        weather.brightness,
        digital.contrast,
        digital.elastic_transform,
        digital.pixelate,
        digital.jpeg_compression,
    )
}
CORRUPTIONS = tuple(_FUNCTIONS)
"""The published names, in the published order."""
SEVERITIES = (1, 2, 3, 4, 5)

_VALUES_AT_ONCE = 2**22  # bounds the memory: a few tensors of 16 MiB, whatever the number of images


def corrupt(images: Tensor, name: str, severity: int, generator: Generator) -> Tensor:
    """The images corrupted, uint8 of the same shape.

    The same generator state gives the same result. Values are cut to whole levels, not rounded, as in the published
    files; what PNG and JPEG coders did there is rounded as they do.

    Args:
        images: uint8 ``(batch, C, H, W)`` of one or three channels, at least 8x8.
        name: One of ``CORRUPTIONS``.
        severity: 1 to 5; the constants depend on the shorter side, see ``tables.table``.
        generator: Source of everything random; it may be on another device than the images.

    Raises:
        InputError: Of a name or severity that does not exist.
        ValueError: Of images of another type or shape.
    """
    check_name(name)
    check_severity(severity)
    if images.dtype != torch.uint8:
        raise ValueError(f"images: expected uint8, got {images.dtype}; corrupt before they are normalised")
    if images.dim() != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 8:
        raise ValueError(
            f"images: expected (batch, 1 or 3, at least 8, at least 8), got {tuple(images.shape)}"
        )
    function = _FUNCTIONS[name]
    constants = tables.table(*images.shape[2:])[name][severity - 1]
    done = torch.empty_like(images)
    size = max(1, _VALUES_AT_ONCE // images[:1].numel()) if len(images) else 1
    for start in range(0, len(images), size):
        part = function(images[start : start + size].float(), generator, *constants)
        # a thousandth of a level against rounding errors of float32, which would cost a whole one
        done[start : start + size] = (part + 1e-3).clamp(0, 255).to(torch.uint8)
    return done


def corrupted_sets(
    images: Tensor, seed: int = 0, names: Sequence[str] = CORRUPTIONS, severities: Sequence[int] = SEVERITIES
) -> Iterator[tuple[str, int, Tensor]]:
    """Name, severity and corrupted images of every cell of the benchmark, one at a time.

    A cell depends on the seed, its name and its severity, not on the other cells that are asked for.
    """
    for name in names:
        check_name(name)
    for name in names:
        for severity in severities:
            cell = CORRUPTIONS.index(name) * len(SEVERITIES) + severity
            generator = torch.Generator().manual_seed((seed << 7) + cell)
            yield name, severity, corrupt(images, name, severity, generator)


def check_name(name: str) -> None:
    """Refuse a corruption that does not exist, with the names that do."""
    if name not in CORRUPTIONS:
        raise InputError(f"{name}: no corruption of this name; {nearest(name, CORRUPTIONS)}")


def check_severity(severity: int) -> None:
    """Refuse what is not 1 to 5."""
    if severity not in SEVERITIES:
        raise InputError(f"severity: expected 1 to 5, got {severity}")
