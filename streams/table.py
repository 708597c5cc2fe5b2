"""A user's own images as a table of files: which class, which task, and what each is used for."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lifelong_ens.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd

    from streams.benchmark import StreamBenchmark
    from streams.folders import ImageFile

_COLUMNS = ("path", "label", "task")
_SPLITS = ("train", "test", "validation")


@dataclass(frozen=True)
class _Row:
    """One image, where the table names it, and what it is for; empty where there is no column split."""

    at: str
    file: ImageFile
    split: str


def image_table(
    *,
    table: str | Path,
    root: str | Path | None = None,
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
    """Tasks of your own images as a table says: columns path, label, task and, if you like, split.

    A task's classes are the labels that occur in it, so that tasks may share classes, all of them or some. Tasks that
    are called by numbers come in their order, others as they first appear.

    Args:
        table: CSV (.csv) or Parquet (.parquet) file with a row for each image.
        root: Folder that the paths start from; the table's own where this is not given.
        num_tasks: Use only the first so many tasks; all where this is not given.
        test_fraction: Fraction of each label of a task held out for testing without a column split.
        seed: Without effect, since nothing is random here; every stream accepts one.
        validation: Fraction of each label's training images of a task that is held out for validation where
            the column split, which says train, test or validation, marks none.
        image_size: Height and width: the short side is resized to it, then the centre is cropped.
        limit: Use at most this many training and test images per label of a task.
        storage: cache keeps decoded images on disk, in $LIFELONG_ENS_CACHE; files decodes each whenever it is needed.
        workers: Threads that decode files; files of a few kB are decoded fastest by one, and are.
        cache_gb: Refuse to cache more than so many GB of decoded images.
    """
    from streams.cache import Storage
    from streams.folders import hold_out_files, stream_of_tasks
    from streams.tasks import TaskOptions

    stored = Storage(storage, workers, cache_gb)
    options = TaskOptions(num_tasks, seed, None, validation, limit, image_size, test_fraction)
    path = Path(table).expanduser()
    rows = _rows(path, path.parent if root is None else Path(root).expanduser())
    _check_repeats(rows, validation)
    if not rows[0].split:
        held = hold_out_files([row.file for row in rows], test_fraction)
        rows = [replace(row, split="test" if out else "train") for row, out in zip(rows, held, strict=True)]
    _check_tasks(rows)
    parts = {split: [row.file for row in rows if row.split == split] for split in _SPLITS}
    tasks = _in_order([row.file.task for row in rows])
    return stream_of_tasks("image_table", path, parts, tasks, options, stored)


def _rows(path: Path, root: Path) -> list[_Row]:
    """The table's rows, none with a gap."""
    from streams.folders import describe_file

    frame = _read(path)
    named = [*_COLUMNS, *(["split"] if "split" in frame else [])]
    for name in named:
        if name not in frame:
            raise InputError(f"{path} has no column {name}; {nearest(name, frame.columns)}")
    rows = []
    for number, *cells in frame[named].itertuples():
        given = dict(zip(named, map(_text, cells), strict=True))
        if not any(given.values()):
            continue
        at = f"{path}, {frame.index.name} {number}"
        for name, value in given.items():
            if not value:
                raise InputError(f"{at} has no {name}; fill it in or remove the {frame.index.name}")
        split = given.get("split", "")
        if split and split not in _SPLITS:
            raise InputError(f"{at} has the split {split!r}; expected {', '.join(_SPLITS)}")
        try:
            rows.append(_Row(at, describe_file(root / given["path"], given["label"], given["task"]), split))
        except InputError as error:
            raise InputError(f"{at}: {error}, or remove the {frame.index.name}") from None
    if not rows:
        raise InputError(f"{path} has no rows; it needs one for each image")
    return rows


def _read(path: Path) -> pd.DataFrame:
    """The whole table; its index has the numbers of the file's lines, or of rows where there are none."""
    import pandas as pd

    readers = {".csv": (_read_csv, 2, "line"), ".parquet": (pd.read_parquet, 1, "row")}
    if path.suffix.lower() not in readers:
        raise InputError(f"the table is {path}; expected a file that ends in {' or '.join(readers)}")
    read, first, unit = readers[path.suffix.lower()]
    try:
        frame = read(path)
    except ImportError:
        raise InputError(
            f"to read {path} needs pyarrow: pip install pyarrow, or save the table as CSV"
        ) from None
    except OSError as error:
        raise InputError(f"the table {path} cannot be read ({error.strerror or error})") from None
    except (ValueError, pd.errors.ParserWarning) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path} is no whole {path.suffix[1:]} file ({reason})") from None
    frame.columns = [str(name).strip() for name in frame.columns]
    frame.index = pd.RangeIndex(first, first + len(frame), name=unit)
    return frame


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    with warnings.catch_warnings():
        # a line with more fields than there are columns is an error wherever it stands
        warnings.simplefilter("error", pd.errors.ParserWarning)
        # a label may be called NA or 007, and empty lines count where lines are numbered
        return pd.read_csv(
            path,
            dtype=str,
            index_col=False,
            encoding="utf-8-sig",
            skip_blank_lines=False,
            keep_default_na=False,
            na_values=["", "nan", "NaN"],
        )


def _text(cell: Any) -> str:
    """A cell as text, empty where there is nothing; whole numbers are written without a fraction."""
    import pandas as pd

    if isinstance(cell, str):
        return cell.strip()
    if pd.isna(cell):
        return ""
    return str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell)


def _in_order(tasks: list[str]) -> list[str]:
    """Each task once: numbers in their order, others as they first appear."""
    names = list(dict.fromkeys(tasks))
    try:
        return sorted(names, key=float)
    except ValueError:
        return names


def _check_repeats(rows: list[_Row], validation: float) -> None:
    """Refuse an image that one row trains on and another may test with."""
    draws_validation = validation > 0 and all(row.split != "validation" for row in rows)
    first: dict[str, _Row] = {}
    for row in rows:
        before = first.setdefault(os.path.normpath(row.file.path), row)
        if before is row:
            continue
        if not row.split or row.split != before.split:
            raise InputError(
                f"{row.at}: {row.file.path} is in {before.at} too, and would be trained on and tested with; "
                f"say the same of both in the column split ({', '.join(_SPLITS)})"
            )
        if draws_validation and row.split == "train":
            raise InputError(
                f"{row.at}: {row.file.path} is in {before.at} too, and a fraction of one may be held out for "
                "validation without the other; mark validation images in the column split"
            )


def _check_tasks(rows: list[_Row]) -> None:
    """Refuse labels of a task that are only trained on or only tested with, and tasks without images for a use."""
    tasks = {split: {row.file.task for row in rows if row.split == split} for split in _SPLITS}
    labels = {
        split: {(row.file.task, row.file.class_name) for row in rows if row.split == split}
        for split in _SPLITS
    }
    for row in rows:
        task, label = row.file.task, row.file.class_name
        for split in _SPLITS[: 3 if tasks["validation"] else 2]:
            if task not in tasks[split]:
                raise InputError(f"{row.at}: task {task} has no {split} images; add some or remove the task")
        for split in _SPLITS[:2]:
            if (task, label) not in labels[split]:
                raise InputError(
                    f"{row.at}: label {label} of task {task} has no {split} image; add one or remove the label"
                )
