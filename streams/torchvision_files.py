"""The files of MNIST, Fashion-MNIST and CIFAR where torchvision keeps them; downloaded when missing."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lifelong_ens.errors import InputError
from lifelong_ens.images import resize
from streams.cache import Source
from streams.store import Plan, from_blocks

_IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


@dataclass(frozen=True)
class FileSet:
    """Where torchvision keeps one data set.

    Attributes:
        dataset: Name of the class in ``torchvision.datasets``.
        folder: Relative to the root.
        names: Every file that is read.
        num_classes: How many classes there are.
    """

    dataset: str
    folder: str
    names: tuple[str, ...]
    num_classes: int


MNIST = FileSet("MNIST", "MNIST/raw", _IDX, 10)
FASHION_MNIST = FileSet("FashionMNIST", "FashionMNIST/raw", _IDX, 10)
_CIFAR10_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
CIFAR10 = FileSet("CIFAR10", "cifar-10-batches-py", _CIFAR10_BATCHES, 10)
CIFAR100 = FileSet("CIFAR100", "cifar-100-python", ("train", "test", "meta"), 100)


def torchvision_source(
    kind: str, files: FileSet, root: str | Path, image_size: int | None, otherwise: str = ""
) -> Source:
    """A source over torchvision's own files.

    Args:
        kind: Names the cache entry.
        files: Which files.
        root: Folder with ``files.folder`` in it, or to download to.
        image_size: Height and width to resize to.
        otherwise: What else the error for missing files offers.
    """
    root = Path(root).expanduser()
    folder = root / files.folder
    if _missing(folder, files):
        _download(files, root, otherwise)
    status = [(name, (folder / name).stat()) for name in files.names]
    found = [(f"{files.folder}/{name}", s.st_size, s.st_mtime_ns) for name, s in status]
    plan = partial(_plan, files, root, image_size)
    return Source(kind, root, lambda: found, plan, {"image_size": image_size})


def _missing(folder: Path, files: FileSet) -> list[str]:
    return [name for name in files.names if not (folder / name).is_file()]


def _open(files: FileSet, root: Path, *, train: bool, download: bool) -> Any:
    import torchvision.datasets

    # torchvision prints its progress; stdout belongs to results
    with contextlib.redirect_stdout(sys.stderr):
        return getattr(torchvision.datasets, files.dataset)(str(root), train=train, download=download)


def _download(files: FileSet, root: Path, otherwise: str) -> None:
    folder = root / files.folder
    missing = _missing(folder, files)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    reason = "the download did not bring them"
    try:
        _open(files, root, train=True, download=True)
    # no network is a URLError, an HTTP error or, after several mirrors, a RuntimeError of many lines
    except (OSError, RuntimeError, ValueError) as error:
        reason = _one_line(error)
    if _missing(folder, files):
        _remove_empty(created)
        raise InputError(
            f"{', '.join(missing)} not found in {folder}, and downloading failed ({reason}); copy "
            f"torchvision's {files.dataset} files there or run once with network access{otherwise}"
        )


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders that a failed download made, the innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _plan(files: FileSet, root: Path, image_size: int | None) -> Plan:
    try:
        parts = [_open(files, root, train=train, download=False) for train in (True, False)]
        images = [_channels_first(np.asarray(part.data)) for part in parts]
        labels = [np.asarray(part.targets, dtype=np.int64) for part in parts]
        if any(len(i) != len(k) for i, k in zip(images, labels, strict=True)):
            raise ValueError("their numbers of images and labels differ")
    # a truncated or altered file shows as any of these in torchvision's readers
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, EOFError, KeyError) as error:
        raise InputError(
            f"{files.dataset}'s files in {root / files.folder} are damaged ({_one_line(error)}); "
            "delete them and fetch them again"
        ) from None
    blocks = [resize(block, image_size) for block in images]
    return from_blocks(blocks, np.concatenate(labels), len(labels[0]), tuple(map(str, parts[0].classes)))


def _channels_first(images: np.ndarray) -> np.ndarray:
    return images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
