"""A user's own images in folders: a folder for every class, or for every domain with the classes in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lifelong_ens.errors import InputError

if TYPE_CHECKING:
    from streams.benchmark import StreamBenchmark
    from streams.folders import ImageFile
    from streams.tasks import TaskOptions


def image_folder(
    *,
    root: str | Path,
    num_tasks: int = 5,
    test_fraction: float = 0.2,
    seed: int = 0,
    class_order: list[int] | None = None,
    validation: float = 0.0,
    image_size: int = 64,
    limit: int | None = None,
    storage: Literal["cache", "files"] = "cache",
    workers: int = 4,
    cache_gb: float | None = None,
) -> StreamBenchmark:
    """Tasks of different classes of your own images.

    Args:
        root: Folder with class folders train/ and test/ (or val/), or with class folders directly in it.
        num_tasks: Number of tasks the classes are spread over.
        test_fraction: Fraction of each class that is held out for testing where root has no train/ folder.
        seed: Seed of the class order.
        class_order: Explicit order of the class ids (by name from 0); wins over seed.
        validation: Fraction of each class's training images that is held out for validation.
        image_size: Height and width: the short side is resized to it, then the centre is cropped.
        limit: Use at most this many training and test images per class.
        storage: cache keeps decoded images on disk, in $LIFELONG_ENS_CACHE; files decodes each whenever it is needed.
        workers: Threads that decode files; files of a few kB are decoded fastest by one, and are.
        cache_gb: Refuse to cache more than so many GB of decoded images.
    """
    from streams.cache import Storage
    from streams.folders import list_class_folders, require_folder, stream_of_files
    from streams.tasks import TaskOptions

    stored = Storage(storage, workers, cache_gb)
    options = TaskOptions(num_tasks, seed, class_order, validation, limit, image_size, test_fraction)
    folder = require_folder(root, "train/<class>/* and test/<class>/*, or <class>/*")
    train, test = _train_and_test(folder, list_class_folders, options)
    return stream_of_files(
        "image_folder", folder, train, test, options, variant=test_fraction, storage=stored
    )


def domain_folder(
    *,
    root: str | Path,
    num_tasks: int | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    validation: float = 0.0,
    image_size: int = 64,
    limit: int | None = None,
    storage: Literal["cache", "files"] = "cache",
    workers: int = 4,
    cache_gb: float | None = None,
) -> StreamBenchmark:
    """Tasks of the same classes of your own images, each task in another domain: one folder for each.

    Args:
        root: Folder with domain folders of class folders in it, or with train/ and test/ (or val/) of these.
        num_tasks: Use only the first so many domains (by name, 10 after 9); all where this is not given.
        test_fraction: Fraction of each domain's class held out for testing where root has no train/ folder.
        seed: Without effect, since nothing is random here; every stream accepts one.
        validation: Fraction of each class's training images of a domain that is held out for validation.
        image_size: Height and width: the short side is resized to it, then the centre is cropped.
        limit: Use at most this many training and test images per class of a domain.
        storage: cache keeps decoded images on disk, in $LIFELONG_ENS_CACHE; files decodes each whenever it is needed.
        workers: Threads that decode files; files of a few kB are decoded fastest by one, and are.
        cache_gb: Refuse to cache more than so many GB of decoded images.
    """
    from lifelong_ens.store import natural
    from streams.cache import Storage
    from streams.folders import require_folder, stream_of_tasks
    from streams.tasks import TaskOptions

    stored = Storage(storage, workers, cache_gb)
    options = TaskOptions(num_tasks, seed, None, validation, limit, image_size, test_fraction)
    layout = "train/<domain>/<class>/* and test/<domain>/<class>/*, or <domain>/<class>/*"
    folder = require_folder(root, layout)
    train, test = _train_and_test(folder, _list_domains, options)
    domains = natural({file.task: None for file in (*train, *test)})
    parts = {"train": train, "test": test}
    _check_same_classes(folder, parts, domains)
    return stream_of_tasks("domain_folder", folder, parts, domains, options, stored)


def _train_and_test(
    folder: Path, listed: Callable[[Path, int | None], list[ImageFile]], options: TaskOptions
) -> tuple[list[ImageFile], list[ImageFile]]:
    """Images to train and to test on: in folders of their own, or a fraction of every class held out."""
    from streams.folders import split_off

    if not (folder / "train").is_dir():
        return split_off(listed(folder, None), options.test_fraction, options.limit)
    parts = [folder / name for name in ("test", "val") if (folder / name).is_dir()]
    if not parts:
        raise InputError(f"{folder} has train/ but no test/ or val/; add one, or move the folders in it up")
    return listed(folder / "train", options.limit), listed(parts[0], options.limit)


def _list_domains(folder: Path, limit: int | None) -> list[ImageFile]:
    """All images under ``folder``/<domain>/<class>/; at most ``limit`` per class of a domain."""
    from streams.folders import folder_names, list_class_folders

    return [
        replace(file, task=domain)
        for domain in folder_names(folder)
        for file in list_class_folders(folder / domain, limit)
    ]


def _check_same_classes(folder: Path, parts: Mapping[str, list[ImageFile]], domains: list[str]) -> None:
    """Refuse a domain that lacks a class of another one, in training or in test images."""
    home = {file.class_name: file.task for files in parts.values() for file in files}
    for part, files in parts.items():
        found = {(file.task, file.class_name) for file in files}
        for domain, name in product(domains, home):
            if (domain, name) not in found:
                raise InputError(
                    f"{folder}: domain {domain} has no {part} image of class {name}, which {home[name]} has; "
                    "add some, or list the images in a table, where tasks may differ (image_table)"
                )
