"""A user's own images in WebDataset shards, on a disk or in an object store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lifelong_ens.errors import InputError

if TYPE_CHECKING:
    from streams.benchmark import StreamBenchmark


def image_shards(  # noqa: PLR0913 the stream has these options
    *,
    train: str,
    test: str | None = None,
    label: str = "cls",
    class_names: str | Path | None = None,
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
    """Tasks of different classes of your own images in WebDataset shards (tar files), read where they are.

    The same images as ``image_folder`` finds in class folders are the same stream, however they are spread over shards.

    Args:
        train: Shards, as paths or addresses that fsspec knows: DIR/train-*.tar, s3://BUCKET/train-{000..099}.tar.
        test: Shards to test on; where this is not given, test_fraction of train is held out.
        label: Ending of each sample's file with its class, a number or a name; json.KEY for a key of its .json.
        class_names: Text file with a class's name in each line, where shards have numbers: 0 is the first line.
        num_tasks: Number of tasks the classes are spread over.
        test_fraction: Fraction of each class that is held out for testing where test is not given.
        seed: Seed of the class order.
        class_order: Explicit order of the class ids (by name from 0); wins over seed.
        validation: Fraction of each class's training images that is held out for validation.
        image_size: Height and width: the short side is resized to it, then the centre is cropped.
        limit: Use at most this many training and test images per class.
        storage: cache keeps decoded images on disk, in $LIFELONG_ENS_CACHE; files decodes each whenever it is needed.
        workers: Threads that read and decode; files of a few kB on a disk are decoded fastest by one, and are.
        cache_gb: Refuse to cache more than so many GB of decoded images.
    """
    from streams.cache import Storage
    from streams.folders import limited, split_off, stream_of_files
    from streams.shards import address, list_shards, read_names
    from streams.tasks import TaskOptions

    stored = Storage(storage, workers, cache_gb)
    options = TaskOptions(num_tasks, seed, class_order, validation, limit, image_size, test_fraction)
    names = None if class_names is None else read_names(Path(class_names).expanduser())
    where = [address(pattern) for pattern in (train, test) if pattern is not None]
    files, *given = (list_shards(pattern, label, names, workers) for pattern in where)
    if not given:
        files, tested = split_off(files, test_fraction, limit)
    elif both := {file.shard for file in files} & {file.shard for file in given[0]}:
        raise InputError(f"{min(both)} is in train and in test; tasks would be tested with what they learned")
    else:
        files, tested = limited(files, limit), limited(given[0], limit)
    return stream_of_files(
        "image_shards", where[0], files, tested, options, variant=[test_fraction, *where[1:]], storage=stored
    )
