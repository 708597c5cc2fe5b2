"""MNIST and Fashion-MNIST: split by class, permuted or rotated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lifelong_ens.errors import InputError

if TYPE_CHECKING:
    from streams.benchmark import StreamBenchmark
    from streams.store import ImageStore
    from streams.tasks import TaskOptions


def split_mnist(
    *,
    root: str | Path = "data",
    num_tasks: int = 5,
    seed: int = 0,
    class_order: list[int] | None = None,
    validation: float = 0.0,
    image_size: int | None = None,
    limit: int | None = None,
) -> StreamBenchmark:
    """Tasks of different handwritten digits: MNIST, 60,000 and 10,000 grey images of 28x28.

    Args:
        root: Folder with torchvision's MNIST/raw/ in it; downloaded there when missing.
        num_tasks: Number of tasks the 10 classes are spread over.
        seed: Seed of the class order.
        class_order: Explicit order of the class ids; wins over seed.
        validation: Fraction of each class's training images that is held out for validation.
        image_size: Height and width that images are resized to.
        limit: Use at most this many training and test images per class.
    """
    from streams import torchvision_files
    from streams.cache import load
    from streams.tasks import TaskOptions, class_stream

    options = TaskOptions(num_tasks, seed, class_order, validation, limit, image_size)
    options.classes_per_task(torchvision_files.MNIST.num_classes)
    source = torchvision_files.torchvision_source("mnist", torchvision_files.MNIST, root, image_size)
    return class_stream("split_mnist", load(source), options)


def split_fashion_mnist(
    *,
    root: str | Path = "data",
    num_tasks: int = 5,
    seed: int = 0,
    class_order: list[int] | None = None,
    validation: float = 0.0,
    image_size: int | None = None,
    limit: int | None = None,
) -> StreamBenchmark:
    """Tasks of different clothes: Fashion-MNIST, 60,000 and 10,000 grey images of 28x28.

    Args:
        root: Folder with torchvision's FashionMNIST/raw/ in it; downloaded there when missing.
        num_tasks: Number of tasks the 10 classes are spread over.
        seed: Seed of the class order.
        class_order: Explicit order of the class ids; wins over seed.
        validation: Fraction of each class's training images that is held out for validation.
        image_size: Height and width that images are resized to.
        limit: Use at most this many training and test images per class.
    """
    from streams import torchvision_files
    from streams.cache import load
    from streams.tasks import TaskOptions, class_stream

    files = torchvision_files.FASHION_MNIST
    options = TaskOptions(num_tasks, seed, class_order, validation, limit, image_size)
    options.classes_per_task(files.num_classes)
    source = torchvision_files.torchvision_source("fashion_mnist", files, root, image_size)
    return class_stream("split_fashion_mnist", load(source), options)


def permuted_mnist(
    *,
    root: str | Path = "data",
    num_tasks: int = 10,
    seed: int = 0,
    validation: float = 0.0,
    image_size: int | None = None,
    limit: int | None = None,
) -> StreamBenchmark:
    """All ten digits of MNIST in every task, with the pixels in another fixed order after the first task.

    Args:
        root: Folder with torchvision's MNIST/raw/ in it; downloaded there when missing.
        num_tasks: Number of tasks, each with all 10 classes.
        seed: Seed of the pixel orders.
        validation: Fraction of each class's training images that is held out for validation.
        image_size: Height and width that images are resized to.
        limit: Use at most this many training and test images per class.
    """
    import numpy as np
    import torch

    from streams.tasks import TaskOptions
    from streams.transforms import Permute

    options = TaskOptions(num_tasks, seed, None, validation, limit, image_size)
    store = _load_mnist(root, image_size)
    pixels = math.prod(store.images.shape[2:])
    transforms: list[Permute | None] = [None]
    for task in range(1, num_tasks):
        order = np.random.default_rng([seed, task]).permutation(pixels)
        transforms.append(Permute(torch.from_numpy(order)))
    return _same_classes("permuted_mnist", store, options, transforms)


def rotated_mnist(
    *,
    root: str | Path = "data",
    num_tasks: int = 5,
    max_angle: float = 180.0,
    seed: int = 0,
    validation: float = 0.0,
    image_size: int | None = None,
    limit: int | None = None,
) -> StreamBenchmark:
    """All ten digits of MNIST in every task, rotated by evenly spaced angles that begin with 0.

    Args:
        root: Folder with torchvision's MNIST/raw/ in it; downloaded there when missing.
        num_tasks: Number of tasks, each with all 10 classes.
        max_angle: Degrees; task t of T is rotated by max_angle * t / T, counter-clockwise.
        seed: Without effect, since nothing is random here; every stream accepts one.
        validation: Fraction of each class's training images that is held out for validation.
        image_size: Height and width that images are resized to.
        limit: Use at most this many training and test images per class.
    """
    from streams.tasks import TaskOptions
    from streams.transforms import Rotate

    options = TaskOptions(num_tasks, seed, None, validation, limit, image_size)
    if not 0 < max_angle <= 360:
        raise InputError(f"max_angle is {max_angle}; expected degrees above 0 and at most 360")
    store = _load_mnist(root, image_size)
    black = tuple((-store.mean / store.std).tolist())
    rotations = [Rotate(max_angle * task / num_tasks, black) for task in range(1, num_tasks)]
    return _same_classes("rotated_mnist", store, options, [None, *rotations])


def _load_mnist(root: str | Path, image_size: int | None) -> ImageStore:
    from streams import torchvision_files
    from streams.cache import load

    return load(torchvision_files.torchvision_source("mnist", torchvision_files.MNIST, root, image_size))


def _same_classes(
    name: str, store: ImageStore, options: TaskOptions, transforms: Sequence[Callable[[Any], Any] | None]
) -> StreamBenchmark:
    """A benchmark whose tasks are the same images under different transforms."""
    from lifelong_ens.training.data import ImageData
    from streams.benchmark import make_benchmark
    from streams.tasks import split_parts

    def tasks(rows: Any) -> list[ImageData]:
        plain = ImageData(store.images, rows, store.labels[rows], store.mean, store.std)
        return [replace(plain, transform=transform) for transform in transforms]

    parts = split_parts(store, options)
    classes = [range(len(store.class_names)) for _ in transforms]
    valid = None if parts.valid is None else tasks(parts.valid)
    return make_benchmark(
        tasks(parts.train),
        tasks(parts.test),
        valid,
        classes=classes,
        class_names=store.class_names,
        name=name,
    )
