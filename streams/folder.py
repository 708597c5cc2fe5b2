"""A user's own images in class folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lifelong_ens.errors import InputError

if TYPE_CHECKING:
    from streams.benchmark import StreamBenchmark
    from streams.folders import ImageFile


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
) -> StreamBenchmark:
    """Tasks of different classes of your own images.

    Args:
        root: Folder with class folders train/ and test/ (or val/), or with class folders directly in it.
        num_tasks: Number of tasks the classes are spread over.
        test_fraction: Fraction of each class that is held out for testing where root has no train/ folder.
        seed: Seed of the class order.
        class_order: Explicit order of the class ids (alphabetical from 0); wins over seed.
        validation: Fraction of each class's training images that is held out for validation.
        image_size: Height and width: the short side is resized to it, then the centre is cropped.
        limit: Use at most this many training and test images per class.
    """
    from streams.folders import folder_stream, list_class_folders, require_folder, stream_of_files
    from streams.tasks import TaskOptions

    options = TaskOptions(num_tasks, seed, class_order, validation, limit, image_size)
    if not 0 < test_fraction < 1:
        raise InputError(f"test_fraction is {test_fraction}; expected a fraction between 0 and 1")
    folder = require_folder(root, "train/<class>/* and test/<class>/*, or <class>/*")
    if not (folder / "train").is_dir():
        train, test = _hold_out_files(list_class_folders(folder), test_fraction)
        return stream_of_files(
            "image_folder",
            folder,
            _limited(train, limit),
            _limited(test, limit),
            options,
            variant=test_fraction,
        )
    parts = [folder / name for name in ("test", "val") if (folder / name).is_dir()]
    if not parts:
        raise InputError(f"{folder} has train/ but no test/ or val/; add one, or move the class folders up")
    return folder_stream("image_folder", folder, folder / "train", parts[0], options)


def _hold_out_files(files: list[ImageFile], fraction: float) -> tuple[list[ImageFile], list[ImageFile]]:
    import torch

    from streams.tasks import hold_out

    names = sorted({file.class_name for file in files})
    ids = {name: number for number, name in enumerate(names)}
    held = hold_out(torch.tensor([ids[file.class_name] for file in files]), fraction, names).tolist()
    pairs = list(zip(files, held, strict=True))
    return [file for file, out in pairs if not out], [file for file, out in pairs if out]


def _limited(files: list[ImageFile], limit: int | None) -> list[ImageFile]:
    by_class: dict[str, list[ImageFile]] = {}
    for file in files:
        by_class.setdefault(file.class_name, []).append(file)
    return [file for of_class in by_class.values() for file in of_class[:limit]]
