"""CIFAR-10 and CIFAR-100 from torchvision's own files or from class folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streams.benchmark import StreamBenchmark
    from streams.tasks import TaskOptions
    from streams.torchvision_files import FileSet


def split_cifar10(
    *,
    root: str | Path = "data",
    num_tasks: int = 5,
    seed: int = 0,
    class_order: list[int] | None = None,
    validation: float = 0.0,
    image_size: int | None = None,
    limit: int | None = None,
) -> StreamBenchmark:
    """Tasks of different objects: CIFAR-10, 50,000 and 10,000 colour images of 32x32.

    Args:
        root: Folder with cifar-10-batches-py/ (downloaded when missing) or class folders train/ and test/.
        num_tasks: Number of tasks the 10 classes are spread over.
        seed: Seed of the class order.
        class_order: Explicit order of the class ids; wins over seed.
        validation: Fraction of each class's training images that is held out for validation.
        image_size: Height and width that images are resized to.
        limit: Use at most this many training and test images per class.
    """
    from streams.tasks import TaskOptions
    from streams.torchvision_files import CIFAR10

    options = TaskOptions(num_tasks, seed, class_order, validation, limit, image_size)
    return _split("split_cifar10", CIFAR10, root, options)


def split_cifar100(
    *,
    root: str | Path = "data",
    num_tasks: int = 10,
    seed: int = 0,
    class_order: list[int] | None = None,
    validation: float = 0.0,
    image_size: int | None = None,
    limit: int | None = None,
) -> StreamBenchmark:
    """Tasks of different objects: CIFAR-100, 50,000 and 10,000 colour images of 32x32.

    Args:
        root: Folder with cifar-100-python/ (downloaded when missing) or class folders train/ and test/.
        num_tasks: Number of tasks the 100 classes are spread over.
        seed: Seed of the class order.
        class_order: Explicit order of the class ids; wins over seed.
        validation: Fraction of each class's training images that is held out for validation.
        image_size: Height and width that images are resized to.
        limit: Use at most this many training and test images per class.
    """
    from streams.tasks import TaskOptions
    from streams.torchvision_files import CIFAR100

    options = TaskOptions(num_tasks, seed, class_order, validation, limit, image_size)
    return _split("split_cifar100", CIFAR100, root, options)


def _split(name: str, files: FileSet, root: str | Path, options: TaskOptions) -> StreamBenchmark:
    from streams.cache import load
    from streams.folders import folder_stream, has_class_folders
    from streams.tasks import class_stream
    from streams.torchvision_files import torchvision_source

    folder = Path(root).expanduser()
    if has_class_folders(folder / "train"):
        return folder_stream(name, folder, folder / "train", folder / "test", options)
    options.classes_per_task(files.num_classes)
    otherwise = f"; class folders {folder}/train/<class>/*.png and {folder}/test/<class>/*.png are read too"
    return class_stream(
        name, load(torchvision_source(name, files, folder, options.image_size, otherwise)), options
    )
