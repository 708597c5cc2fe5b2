"""Scikit-learn's bundled handwritten digits: real scans that need no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streams.benchmark import StreamBenchmark
    from streams.store import ImageStore

TEST_FRACTION = 0.25


def split_digits(
    *,
    num_tasks: int = 5,
    seed: int = 0,
    class_order: list[int] | None = None,
    validation: float = 0.0,
    image_size: int | None = None,
    limit: int | None = None,
) -> StreamBenchmark:
    """Tasks of different handwritten digits: 1,797 grey images of 8x8 that come with scikit-learn.

    A quarter of each class, always the same, is held out for testing.

    Args:
        num_tasks: Number of tasks the 10 classes are spread over.
        seed: Seed of the class order.
        class_order: Explicit order of the class ids; wins over seed.
        validation: Fraction of each class's training images that is held out for validation.
        image_size: Height and width that images are resized to.
        limit: Use at most this many training and test images per class.
    """
    from streams.tasks import TaskOptions, class_stream

    options = TaskOptions(num_tasks, seed, class_order, validation, limit, image_size)
    return class_stream("split_digits", _read_digits(image_size), options)


def _read_digits(image_size: int | None) -> ImageStore:
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    from lifelong_ens.images import resize
    from streams.store import from_blocks, in_memory
    from streams.tasks import hold_out

    pixels, targets = load_digits(return_X_y=True)
    # the scans count ink from 0 to 16
    images = np.round(np.asarray(pixels) * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = np.asarray(targets).astype(np.int64)
    test = hold_out(torch.from_numpy(labels), TEST_FRACTION).numpy()
    order = np.concatenate([(~test).nonzero()[0], test.nonzero()[0]])
    names = tuple(str(digit) for digit in range(10))
    plan = from_blocks([resize(images[order], image_size)], labels[order], int((~test).sum()), names)
    return in_memory(plan, "split_digits")
