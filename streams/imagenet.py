"""Tiny-ImageNet and ImageNet from their folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lifelong_ens.errors import InputError

if TYPE_CHECKING:
    from streams.benchmark import StreamBenchmark
    from streams.folders import ImageFile


def split_tiny_imagenet(
    *,
    root: str | Path,
    num_tasks: int = 10,
    seed: int = 0,
    class_order: list[int] | None = None,
    validation: float = 0.0,
    image_size: int = 64,
    limit: int | None = None,
) -> StreamBenchmark:
    """Tasks of different objects: Tiny-ImageNet, colour images of 64x64.

    Args:
        root: Folder with train/<wnid>/ and val/<wnid>/, or with tiny-imagenet-200/ as it is distributed.
        num_tasks: Number of tasks the classes are spread over.
        seed: Seed of the class order.
        class_order: Explicit order of the class ids; wins over seed.
        validation: Fraction of each class's training images that is held out for validation.
        image_size: Height and width that images are resized to.
        limit: Use at most this many training and test images per class.
    """
    from streams.folders import folder_stream, list_class_folders, require_folder, stream_of_files
    from streams.tasks import TaskOptions

    options = TaskOptions(num_tasks, seed, class_order, validation, limit, image_size)
    folder = require_folder(root, "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or tiny-imagenet-200/")
    if (folder / "tiny-imagenet-200").is_dir():
        folder = folder / "tiny-imagenet-200"
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return folder_stream("split_tiny_imagenet", folder, folder / "train", folder / "val", options)
    train = list_class_folders(folder / "train", limit)
    test = _read_annotations(annotations, limit)
    return stream_of_files("split_tiny_imagenet", folder, train, test, options)


def _read_annotations(path: Path, limit: int | None) -> list[ImageFile]:
    """The validation images that the list beside them names, class by class."""
    from streams.folders import describe_file

    by_class: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise InputError(f"{path}, line {number}: expected <image><tab><wnid><tab>...; restore this file")
        by_class.setdefault(fields[1], []).append(fields[0])
    images = path.parent / "images"
    return [
        describe_file(images / name, wnid)
        for wnid in sorted(by_class)
        for name in sorted(by_class[wnid])[:limit]
    ]


def split_imagenet(
    *,
    root: str | Path,
    num_tasks: int = 100,
    seed: int = 0,
    class_order: list[int] | None = None,
    validation: float = 0.0,
    image_size: int = 224,
    limit: int | None = None,
    storage: Literal["cache", "files"] = "cache",
    workers: int = 4,
    cache_gb: float | None = None,
) -> StreamBenchmark:
    """Tasks of different objects: ImageNet, the centre of each image after resizing its short side.

    Args:
        root: Folder with class folders train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.
        num_tasks: Number of tasks the classes are spread over.
        seed: Seed of the class order.
        class_order: Explicit order of the class ids; wins over seed.
        validation: Fraction of each class's training images that is held out for validation.
        image_size: Height and width of the centre crop; the short side is resized to 256/224 of it.
        limit: Use at most this many training and test images per class.
        storage: cache keeps decoded images on disk, in $LIFELONG_ENS_CACHE; files decodes each whenever it is needed.
        workers: Threads that decode files; files of a few kB are decoded fastest by one, and are.
        cache_gb: Refuse to cache more than so many GB of decoded images.
    """
    from streams.cache import Storage
    from streams.folders import folder_stream, require_folder
    from streams.tasks import TaskOptions

    stored = Storage(storage, workers, cache_gb)
    options = TaskOptions(num_tasks, seed, class_order, validation, limit, image_size)
    folder = require_folder(root, "class folders train/<wnid>/*.JPEG and val/<wnid>/*.JPEG")
    parts = folder / "train", folder / "val"
    return folder_stream("split_imagenet", folder, *parts, options, crop_margin=256 / 224, storage=stored)
