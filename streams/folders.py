"""Image files, of class folders or listed elsewhere: fingerprinted and made into streams."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lifelong_ens.errors import InputError
from lifelong_ens.images import EXTENSIONS, find_images, is_hidden, read_image
from lifelong_ens.store import natural
from streams.cache import Source, Storage, load
from streams.files import ImageFiles, Members, ReadImage, is_remote
from streams.store import Plan
from streams.tasks import TaskOptions, class_stream, hold_out, task_stream

if TYPE_CHECKING:
    from streams.benchmark import StreamBenchmark

# below this, threads lose more to the interpreter's lock than they win from parallel decoding: one does best
_THREADED_BYTES = 16_000
_BLOCK_BYTES = 8_000_000


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image with its class, what its fingerprint needs, and its task where the user gave one.

    Attributes:
        path: Of the file; of a shard's member ``<shard>/<member>``.
        class_name: Of its class.
        num_bytes: Its size.
        version: Changes whenever the file, or the shard, does: a file's time of modification in ns.
        task: As the user called it.
        shard: Address of the shard; empty where the image is a file of its own.
        start: Where in the shard it begins, in bytes.
    """

    path: str
    class_name: str
    num_bytes: int
    version: int | str
    task: str = ""
    shard: str = ""
    start: int = 0


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
    return folder.is_dir() and bool(folder_names(folder))


def folder_names(folder: Path) -> list[str]:
    """The folders in a folder, by name; what is hidden is left out."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name))


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
    for name in folder_names(folder):
        found = islice(find_images(folder / name), limit)
        of_class = [_image_file(entry.path, name, entry.stat()) for entry in found]
        if not of_class:
            raise InputError(
                f"{folder / name} holds no images ({', '.join(EXTENSIONS)}); add some or remove the folder"
            )
        files.extend(of_class)
    return files


def describe_file(path: Path, class_name: str, task: str = "") -> ImageFile:
    """One file that a list names."""
    try:
        return _image_file(str(path), class_name, path.stat(), task)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); restore it") from None


def _image_file(path: str, class_name: str, status: os.stat_result, task: str = "") -> ImageFile:
    return ImageFile(path, class_name, status.st_size, status.st_mtime_ns, task)


def hold_out_files(files: Sequence[ImageFile], fraction: float) -> list[bool]:
    """Which files are held out: of every class in every task at least one, and never all."""
    groups = sorted({(file.task, file.class_name) for file in files})
    ids = {group: number for number, group in enumerate(groups)}
    names = [f"{name} of task {task}" if task else name for task, name in groups]
    numbers = torch.tensor([ids[file.task, file.class_name] for file in files])
    return hold_out(numbers, fraction, names).tolist()


def split_off(
    files: Sequence[ImageFile], fraction: float, limit: int | None
) -> tuple[list[ImageFile], list[ImageFile]]:
    """Images to train on and a fraction of every class held out to test with, at most ``limit`` of each."""
    held = hold_out_files(files, fraction)
    train, test = ([f for f, out in zip(files, held, strict=True) if out is part] for part in (False, True))
    return limited(train, limit), limited(test, limit)


def limited(files: Sequence[ImageFile], limit: int | None) -> list[ImageFile]:
    """The first ``limit`` files of every class in every task."""
    groups: dict[tuple[str, str], list[ImageFile]] = {}
    for file in files:
        groups.setdefault((file.task, file.class_name), []).append(file)
    return [file for group in groups.values() for file in group[:limit]]


def folder_source(
    kind: str,
    root: str | Path,
    train: Sequence[ImageFile],
    test: Sequence[ImageFile],
    *,
    image_size: int | None,
    crop_margin: float = 1.0,
    variant: Any = None,
    limit: int | None = None,
    workers: int = 0,
) -> tuple[Source, tuple[str, ...]]:
    """A source over listed files, and its class names in order.

    Args:
        kind: Names the stream.
        root: The folder that the user named, or the address of shards.
        train: Training images.
        test: Images that are not trained on.
        image_size: Height and width of the decoded images; ``None`` keeps them, if all agree.
        crop_margin: The short side is resized to ``image_size * crop_margin`` before the centre is cropped.
        variant: What else chose the files, as JSON can hold it.
        limit: What limited the lists.
        workers: Threads that decode; of images of a few kB on a disk at most one, which then is faster than several.
    """
    names = tuple(natural({file.class_name: None for file in train}))
    check_same_classes(names, [file.class_name for file in test], str(root))
    files = [*train, *test]
    ids = {name: number for number, name in enumerate(names)}
    labels = np.array([ids[file.class_name] for file in files], dtype=np.int64)
    read = partial(read_image, image_size=image_size, crop_margin=crop_margin)
    small = sum(file.num_bytes for file in files) < _THREADED_BYTES * len(files)
    # whoever waits for a store does better with many requests under way
    threads = min(workers, 1) if small and not any(is_remote(file.shard) for file in files) else workers
    plan = partial(_plan, files, labels, len(train), names, read, threads)
    options = {"image_size": image_size, "limit": limit, "crop_margin": crop_margin, "variant": variant}
    return Source(kind, root, partial(_fingerprints, root, files, len(train)), plan, options), names


def _fingerprints(
    root: str | Path, files: Sequence[ImageFile], num_train: int
) -> list[tuple[str, int, int | str, str, bool]]:
    def name(file: ImageFile) -> str:
        return os.path.relpath(file.path, root) if isinstance(root, Path) else file.path

    # a table may change what a file is taken for without touching it
    return [
        (name(file), file.num_bytes, file.version, file.class_name, row < num_train)
        for row, file in enumerate(files)
    ]


def folder_stream(
    name: str,
    root: Path,
    train: Path,
    test: Path,
    options: TaskOptions,
    *,
    crop_margin: float = 1.0,
    storage: Storage | None = None,
) -> StreamBenchmark:
    """A stream over class folders of training and of test images."""
    files, test_files = (list_class_folders(folder, options.limit) for folder in (train, test))
    return stream_of_files(name, root, files, test_files, options, crop_margin=crop_margin, storage=storage)


def stream_of_files(
    name: str,
    root: str | Path,
    train: Sequence[ImageFile],
    test: Sequence[ImageFile],
    options: TaskOptions,
    *,
    crop_margin: float = 1.0,
    variant: Any = None,
    storage: Storage | None = None,
) -> StreamBenchmark:
    """A stream over listed files; ``variant`` is whatever else chose them."""
    storage = storage or Storage()
    source, names = folder_source(
        name,
        root,
        train,
        test,
        image_size=options.image_size,
        crop_margin=crop_margin,
        variant=variant,
        limit=options.limit,
        workers=storage.workers,
    )
    # decoding can take hours: options that do not fit the classes are refused before it
    options.classes_per_task(len(names))
    benchmark = class_stream(name, load(source, storage), options)
    benchmark.crop_margin = crop_margin
    return benchmark


def stream_of_tasks(
    name: str,
    root: Path,
    files: Mapping[str, Sequence[ImageFile]],
    tasks: Sequence[str],
    options: TaskOptions,
    storage: Storage,
) -> StreamBenchmark:
    """A stream over files that say their tasks.

    Args:
        name: Of the stream.
        root: The folder or file that the user named.
        files: ``train``, ``test`` and, where these are given, ``validation``.
        tasks: All there are, in their order; each has images in ``train`` and in ``test``.
        options: The user's.
        storage: Where the images stay.
    """
    tasks = tasks[: options.num_tasks_of(len(tasks), "tasks")]
    ids = {task: number for number, task in enumerate(tasks)}
    train, test, valid = (
        limited([file for file in files.get(part, []) if file.task in ids], options.limit)
        for part in ("train", "test", "validation")
    )
    source, _ = folder_source(
        name,
        root,
        train,
        [*test, *valid],
        image_size=options.image_size,
        variant=[options.test_fraction, len(tasks)],
        limit=options.limit,
        workers=storage.workers,
    )
    of_task = torch.tensor([ids[file.task] for file in (*train, *test, *valid)])
    benchmark = task_stream(name, load(source, storage), of_task, tasks, len(valid), options.validation)
    benchmark.crop_margin = 1.0
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
    files: Sequence[ImageFile],
    labels: np.ndarray,
    num_train: int,
    names: tuple[str, ...],
    read: ReadImage,
    threads: int,
) -> Plan:
    paths, members = [file.path for file in files], _members(files)
    content = None if members is None else next(members.read(np.zeros(1, dtype=np.int64)))
    first = read(paths[0], content=content)
    shape = (first.shape[0], first.shape[1], first.shape[2])
    read_same = partial(_read_same, read=read, shape=shape, like=paths[0])
    images = ImageFiles(paths, read_same, shape, threads, members)
    per_block = max(_BLOCK_BYTES // first.size, 1)
    return Plan(labels, num_train, names, shape, partial(_blocks, images, per_block), images)


def _members(files: Sequence[ImageFile]) -> Members | None:
    """Where the images lie in shards; ``None`` where each is a file of its own."""
    if not files[0].shard:
        return None
    numbers = {shard: number for number, shard in enumerate(sorted({file.shard for file in files}))}
    shard = np.array([numbers[file.shard] for file in files], dtype=np.int32)
    start = np.array([file.start for file in files], dtype=np.int64)
    return Members(list(numbers), shard, start, start + np.array([file.num_bytes for file in files]))


def _blocks(files: ImageFiles, per_block: int) -> Iterator[np.ndarray]:
    rows = torch.arange(files.shape[0])
    return (images.numpy() for images in files.read_ahead(rows.split(per_block)))


def _read_same(
    path: str, *, content: bytes | None, read: ReadImage, shape: tuple[int, int, int], like: str
) -> np.ndarray:
    image = read(path, content=content)
    if image.shape != shape:
        sizes = [f"{s[2]}x{s[1]}" for s in (image.shape, shape)]
        raise InputError(
            f"{path} is {sizes[0]} but {like} is {sizes[1]}; pass image_size to bring all images to one size"
        )
    return image
