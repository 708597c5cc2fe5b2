"""Class folders of image files: listed, fingerprinted and decoded with a few threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lifelong_ens.errors import InputError
from lifelong_ens.images import EXTENSIONS, read_image
from streams.cache import Source, load
from streams.store import Plan
from streams.tasks import TaskOptions, class_stream

if TYPE_CHECKING:
    from streams.benchmark import StreamBenchmark

_THREADS = min(4, os.cpu_count() or 1)
# below this, threads lose more to the interpreter's lock than they win from parallel decoding
_THREADED_BYTES = 16_000
_BLOCK_BYTES = 8_000_000


@dataclass(frozen=True)
class ImageFile:
    """One image on disk with its class name and what its fingerprint needs."""

    path: str
    class_name: str
    num_bytes: int
    mtime_ns: int


def require_folder(root: str | Path, layout: str) -> Path:
    """``root`` as a path, if it is a folder with something in it."""
    path = Path(root).expanduser()
    try:
        content = any(path.iterdir())
    except OSError as error:
        raise InputError(
            f"{path} is not a readable folder ({error.strerror}); expected {layout} in it"
        ) from None
    if not content:
        raise InputError(f"{path} is empty; expected {layout} in it")
    return path


def has_class_folders(folder: Path) -> bool:
    """Whether ``folder`` is there and holds folders."""
    return folder.is_dir() and bool(_class_names(folder))


def _class_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def list_class_folders(folder: Path, limit: int | None = None) -> list[ImageFile]:
    """All images under ``folder``/<class>/, class by class, names in order; at most ``limit`` per class."""
    try:
        return _list_classes(folder, limit)
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}); restore it or its permissions"
        ) from None


def _list_classes(folder: Path, limit: int | None) -> list[ImageFile]:
    if not has_class_folders(folder):
        raise InputError(f"{folder} holds no class folders; expected {folder}/<class>/*.png or .jpg")
    files: list[ImageFile] = []
    for name in _class_names(folder):
        of_class = list(islice(_walk(str(folder / name), name), limit))
        if not of_class:
            raise InputError(f"{folder / name} holds no images; add some or remove the folder")
        files.extend(of_class)
    return files


def _walk(folder: str, class_name: str) -> Iterator[ImageFile]:
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, class_name)
        elif entry.name.lower().endswith(EXTENSIONS):
            status = entry.stat()
            yield ImageFile(entry.path, class_name, status.st_size, status.st_mtime_ns)


def describe_file(path: Path, class_name: str) -> ImageFile:
    """One file that a list names."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); restore it") from None
    return ImageFile(str(path), class_name, status.st_size, status.st_mtime_ns)


def folder_source(
    kind: str,
    root: Path,
    train: Sequence[ImageFile],
    test: Sequence[ImageFile],
    *,
    image_size: int | None,
    crop_margin: float = 1.0,
    variant: float | None = None,
    limit: int | None = None,
) -> tuple[Source, tuple[str, ...]]:
    """A source over listed files, and its class names in order.

    Args:
        kind: Names the stream.
        root: The folder that the user named.
        train: Training images, class by class.
        test: Test images.
        image_size: Height and width of the decoded images; ``None`` keeps them, if all agree.
        crop_margin: The short side is resized to ``image_size * crop_margin`` before the centre is cropped.
        variant: What else chose the files.
        limit: What limited the lists.
    """
    names = tuple(dict.fromkeys(file.class_name for file in train))
    check_same_classes(names, tuple(dict.fromkeys(file.class_name for file in test)), str(root))
    files = [*train, *test]
    ids = {name: number for number, name in enumerate(names)}
    labels = np.array([ids[file.class_name] for file in files], dtype=np.int64)
    fingerprints = [(os.path.relpath(file.path, root), file.num_bytes, file.mtime_ns) for file in files]
    read = partial(read_image, image_size=image_size, crop_margin=crop_margin)
    threads = _THREADS if sum(file.num_bytes for file in files) > _THREADED_BYTES * len(files) else 1
    plan = partial(_plan, [file.path for file in files], labels, len(train), names, read, threads)
    options = {"image_size": image_size, "limit": limit, "crop_margin": crop_margin, "variant": variant}
    return Source(kind, root, fingerprints, plan, options), names


def folder_stream(
    name: str, root: Path, train: Path, test: Path, options: TaskOptions, *, crop_margin: float = 1.0
) -> StreamBenchmark:
    """A stream over class folders of training and of test images."""
    lists = [list_class_folders(folder, options.limit) for folder in (train, test)]
    return stream_of_files(name, root, lists[0], lists[1], options, crop_margin=crop_margin)


def stream_of_files(
    name: str,
    root: Path,
    train: Sequence[ImageFile],
    test: Sequence[ImageFile],
    options: TaskOptions,
    *,
    crop_margin: float = 1.0,
    variant: float | None = None,
) -> StreamBenchmark:
    """A stream over listed files; ``variant`` is whatever else chose them."""
    source, names = folder_source(
        name,
        root,
        train,
        test,
        image_size=options.image_size,
        crop_margin=crop_margin,
        variant=variant,
        limit=options.limit,
    )
    # decoding can take hours: options that do not fit the classes are refused before it
    options.classes_per_task(len(names))
    benchmark = class_stream(name, load(source), options)
    benchmark.crop_margin = crop_margin
    return benchmark


def check_same_classes(train: Sequence[str], test: Sequence[str], where: str) -> None:
    """Refuse classes that only one of the two parts has."""
    if unseen := sorted(set(test) - set(train)):
        raise InputError(
            f"{where}: {_some(unseen)} in the test images but not in the training images; add or remove"
        )
    if untested := sorted(set(train) - set(test)):
        raise InputError(f"{where}: {_some(untested)} without any test image; add some or remove the class")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"class{'es' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


def _plan(
    paths: Sequence[str],
    labels: np.ndarray,
    num_train: int,
    names: tuple[str, ...],
    read: Callable[[str], np.ndarray],
    threads: int,
) -> Plan:
    first = read(paths[0])
    shape = (first.shape[0], first.shape[1], first.shape[2])
    read_same = partial(_read_same, read=read, shape=shape, like=paths[0])
    per_block = max(threads, _BLOCK_BYTES // first.size)
    return Plan(labels, num_train, names, shape, partial(_blocks, paths, read_same, per_block, threads))


def _blocks(
    paths: Sequence[str], read: Callable[[str], np.ndarray], per_block: int, threads: int
) -> Iterator[np.ndarray]:
    with ThreadPoolExecutor(threads) as pool:
        run = pool.map if threads > 1 else map
        for start in range(0, len(paths), per_block):
            yield np.stack(list(run(read, paths[start : start + per_block])))


def _read_same(
    path: str, read: Callable[[str], np.ndarray], shape: tuple[int, int, int], like: str
) -> np.ndarray:
    image = read(path)
    if image.shape != shape:
        sizes = [f"{s[2]}x{s[1]}" for s in (image.shape, shape)]
        raise InputError(
            f"{path} is {sizes[0]} but {like} is {sizes[1]}; pass image_size to bring all images to one size"
        )
    return image
