"""Images that are in memory already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lifelong_ens.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from streams.benchmark import StreamBenchmark

_MAX_CHANNELS = 4


def from_arrays(
    train_images: Any,
    train_labels: Any,
    test_images: Any,
    test_labels: Any,
    *,
    num_tasks: int = 5,
    seed: int = 0,
    class_order: list[int] | None = None,
    validation: float = 0.0,
    image_size: int | None = None,
    limit: int | None = None,
) -> StreamBenchmark:
    """Tasks of different classes of images in NumPy arrays or tensors.

    Args:
        train_images: Bytes, (n, C, H, W), (n, H, W, C) or (n, H, W).
        train_labels: Integers, (n,); class ids count the distinct ones in ascending order.
        test_images: Bytes, of the same shape per image.
        test_labels: Integers, (n,).
        num_tasks: Number of tasks the classes are spread over.
        seed: Seed of the class order.
        class_order: Explicit order of the class ids; wins over seed.
        validation: Fraction of each class's training images that is held out for validation.
        image_size: Height and width that images are resized to.
        limit: Use at most this many training and test images per class.
    """
    import numpy as np

    from lifelong_ens.images import resize
    from streams.folders import check_same_classes
    from streams.store import from_blocks, in_memory
    from streams.tasks import TaskOptions, class_stream

    options = TaskOptions(num_tasks, seed, class_order, validation, limit, image_size)
    images = [_images(train_images, "train_images"), _images(test_images, "test_images")]
    if images[0].shape[1:] != images[1].shape[1:]:
        shapes = [part.shape[1:] for part in images]
        raise InputError(
            f"train_images are {shapes[0]} each but test_images {shapes[1]}; bring both to one shape"
        )
    labels = [
        _labels(train_labels, "train_labels", len(images[0])),
        _labels(test_labels, "test_labels", len(images[1])),
    ]
    classes = [tuple(map(str, np.unique(part))) for part in labels]
    check_same_classes(classes[0], classes[1], "from_arrays")
    ids, numbered = np.unique(np.concatenate(labels), return_inverse=True)
    blocks = [resize(part, image_size) for part in images]
    names = tuple(map(str, ids))
    plan = from_blocks(blocks, numbered.astype(np.int64), len(labels[0]), names)
    return class_stream("from_arrays", in_memory(plan, "from_arrays"), options)


def _images(given: Any, name: str) -> np.ndarray:
    """Bytes in the layout ``(n, C, H, W)``."""
    import numpy as np

    images = np.asarray(given)
    if images.dtype != np.uint8:
        raise InputError(f"{name} has dtype {images.dtype}; expected uint8 from 0 to 255")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] > _MAX_CHANNELS >= images.shape[3]:
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] > _MAX_CHANNELS or images.size == 0:
        raise InputError(
            f"{name} has shape {tuple(np.shape(given))}; expected (n, C, H, W), (n, H, W, C) or (n, H, W) "
            f"with at least one image and at most {_MAX_CHANNELS} channels"
        )
    return np.ascontiguousarray(images)


def _labels(given: Any, name: str, count: int) -> np.ndarray:
    import numpy as np

    labels = np.asarray(given)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{name} has shape {labels.shape} and dtype {labels.dtype}; "
            f"expected one integer for each of {count} images"
        )
    return labels.astype(np.int64)
