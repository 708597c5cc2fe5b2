"""The official files of CIFAR-10-C and CIFAR-100-C: ``<name>.npy`` and ``labels.npy`` in one folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lifelong_ens.corruptions import CORRUPTIONS, SEVERITIES, check_severity
from lifelong_ens.errors import InputError, nearest

EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Files that come with the 15, meant for tuning; not part of the benchmark."""

_NUM_IMAGES = 10_000  # the test images, once for each severity


def read_cifar_c(folder: str | Path, name: str, severity: int) -> tuple[Tensor, Tensor]:
    """Images, uint8 ``(10000, 3, 32, 32)``, and labels ``(10000,)`` of one corruption and severity.

    Only this severity's part of the file is read. The order is that of CIFAR's test images.

    Args:
        folder: With the unpacked archive, ``gaussian_noise.npy`` and so on and ``labels.npy``.
        name: One of ``CORRUPTIONS`` or ``EXTRA``.
        severity: 1 to 5.

    Raises:
        InputError: Of a name or severity that does not exist, and of a file that is missing, truncated, pickled or of
            another shape or type.
    """
    names = (*CORRUPTIONS, *EXTRA)
    if name not in names:
        raise InputError(f"{name}: no corruption of this name; {nearest(name, names)}")
    check_severity(severity)
    total = _NUM_IMAGES * len(SEVERITIES)
    folder = Path(folder).expanduser()
    images = _open(folder / f"{name}.npy", (total, 32, 32, 3))
    labels = _open(folder / "labels.npy", (total,))
    if images.dtype != np.uint8:
        raise InputError(
            f"{folder / name}.npy: expected uint8, got {images.dtype}; fetch the official file again"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{folder / 'labels.npy'}: expected integers, got {labels.dtype}; fetch the official file"
        )
    part = slice((severity - 1) * _NUM_IMAGES, severity * _NUM_IMAGES)
    channels_first = np.ascontiguousarray(images[part].transpose(0, 3, 1, 2))
    return torch.from_numpy(channels_first), torch.from_numpy(labels[part].astype(np.int64))


def _open(path: Path, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """The array in the file, mapped and not read."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found; unpack the official CIFAR-10-C or CIFAR-100-C archive there"
        ) from None
    # a truncated, pickled or foreign file shows as any of these
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: not a readable .npy file ({reason}); fetch the official file again"
        ) from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(
            f"{path}: expected one array, got an archive of several; fetch the official file again"
        )
    if array.shape != shape:
        raise InputError(
            f"{path}: expected the shape {shape}, got {array.shape}; fetch the official file again"
        )
    return array
