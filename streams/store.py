"""Images decoded once into one uint8 tensor, or read from files, and the plan by which a source is decoded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lifelong_ens.errors import InputError
from lifelong_ens.training.data import ImageReader

Blocks = Callable[[], Iterator[np.ndarray]]
# enough for means that are right to about one grey level of 256
STATISTICS_IMAGES = 1024


@dataclass(frozen=True, eq=False, repr=False)
class ImageStore:
    """All images of a source, training images first.

    Attributes:
        images: uint8 ``(n, C, H, W)``; may be memory-mapped, or read from files.
        labels: Class ids, int64 ``(n,)``.
        num_train: How many of the first images are training images.
        mean: Of the training images per channel, on the scale 0..255, ``(C,)``.
        std: Likewise.
        class_names: The name of each class id.
    """

    images: Tensor | ImageReader
    labels: Tensor
    num_train: int
    mean: Tensor
    std: Tensor
    class_names: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What a source holds, known before its images are decoded.

    Attributes:
        labels: Class ids, training images first, int64 ``(n,)``.
        num_train: How many of the first images are training images.
        class_names: The name of each class id.
        image_shape: ``(C, H, W)`` of one image.
        blocks: Starts decoding: yields uint8 ``(k, C, H, W)`` in the order of ``labels``.
        reader: Decodes any of the images; ``None`` where they can be decoded only all together.
    """

    labels: np.ndarray
    num_train: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    blocks: Blocks
    reader: ImageReader | None = None

    @property
    def images_bytes(self) -> int:
        """Bytes of all decoded images."""
        return len(self.labels) * int(np.prod(self.image_shape))


class ChannelStatistics:
    """Mean and standard deviation per channel, summed exactly in integers block by block."""

    def __init__(self, channels: int):
        self._count = 0
        self._sum = np.zeros(channels, dtype=np.int64)
        self._squares = np.zeros(channels, dtype=np.int64)

    def update(self, images: np.ndarray) -> None:
        """Add a block of images, uint8 ``(k, C, H, W)``."""
        self._count += images[:, 0].size
        self._sum += images.sum(axis=(0, 2, 3), dtype=np.int64)
        # 255 ** 2 still fits 16 bits
        self._squares += np.square(images, dtype=np.uint16).sum(axis=(0, 2, 3), dtype=np.int64)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, float32 ``(C,)``; a constant channel has the standard deviation 1."""
        mean = self._sum / max(self._count, 1)
        variance = self._squares / max(self._count, 1) - mean**2
        std = np.sqrt(np.maximum(variance, 0.0))
        return mean.astype(np.float32), np.where(std > 1e-6, std, 1.0).astype(np.float32)


def decode(plan: Plan, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of decoded images, each with the number of images before it; a progress bar if it takes long."""
    done = 0
    with tqdm(
        total=len(plan.labels),
        desc=f"decode {name}",
        unit="image",
        delay=2,
        leave=False,
        disable=None,
        file=sys.stderr,
    ) as bar:
        for block in plan.blocks():
            yield done, block
            done += len(block)
            bar.update(len(block))


def from_reader(plan: Plan) -> ImageStore:
    """Images that are decoded whenever they are needed.

    Mean and standard deviation are those of ``STATISTICS_IMAGES`` training images spread evenly, or of all if these
    are no more.

    Raises:
        ValueError: The plan has no reader.
    """
    if plan.reader is None:
        raise ValueError("these images can be decoded only all together")
    count = min(plan.num_train, STATISTICS_IMAGES)
    rows = torch.arange(count) * plan.num_train // count
    statistics = ChannelStatistics(plan.image_shape[0])
    for images in plan.reader.read_ahead(rows.split(32)):
        statistics.update(images.numpy())
    mean, std = map(torch.from_numpy, statistics.result())
    return ImageStore(plan.reader, torch.from_numpy(plan.labels), plan.num_train, mean, std, plan.class_names)


def train_part(plan: Plan, first: int, block: np.ndarray) -> np.ndarray:
    """The training images of a block that starts at image ``first``."""
    return block[: max(plan.num_train - first, 0)]


def in_memory(plan: Plan, name: str) -> ImageStore:
    """Decode a plan into memory."""
    _require_memory(plan, name)
    images = torch.empty((len(plan.labels), *plan.image_shape), dtype=torch.uint8)
    statistics = ChannelStatistics(plan.image_shape[0])
    for first, block in decode(plan, name):
        images[first : first + len(block)] = torch.from_numpy(block)
        statistics.update(train_part(plan, first, block))
    mean, std = map(torch.from_numpy, statistics.result())
    return ImageStore(images, torch.from_numpy(plan.labels), plan.num_train, mean, std, plan.class_names)


def _require_memory(plan: Plan, name: str) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if plan.images_bytes > memory:
        raise InputError(
            f"{name}: {len(plan.labels)} decoded images need {plan.images_bytes / 1e9:.1f} GB, this machine "
            f"has {memory / 1e9:.1f} GB of memory; set LIFELONG_ENS_CACHE to a folder with that much disk "
            "space, or pass a smaller image_size or limit, or, for image files, storage=files"
        )


def from_blocks(
    blocks: Sequence[np.ndarray], labels: np.ndarray, num_train: int, class_names: tuple[str, ...]
) -> Plan:
    """The plan of images that are in memory already, uint8 ``(k, C, H, W)`` each."""
    shape = blocks[0].shape[1:]
    return Plan(labels, num_train, class_names, (shape[0], shape[1], shape[2]), lambda: iter(blocks))
