"""From one store of images to a stream of tasks: class order, sizes, limits and held-out parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lifelong_ens.errors import InputError
from lifelong_ens.training.data import ImageData
from streams.store import ImageStore

if TYPE_CHECKING:
    from streams.benchmark import StreamBenchmark


@dataclass(frozen=True)
class TaskOptions:
    """The arguments that every builder shares, checked as soon as they are given.

    Attributes:
        num_tasks: How many tasks; ``None`` for as many as there can be.
        seed: Of the class order.
        class_order: Explicit order of the class ids; wins over ``seed``.
        validation: Fraction of every class's training samples, in [0, 1).
        limit: Samples per class, of training and of test images each.
        image_size: Height and width of the images.
        test_fraction: Fraction of every class, in (0, 1), that is held out where no test images are given.
    """

    num_tasks: int | None
    seed: int = 0
    class_order: Sequence[int] | None = None
    validation: float = 0.0
    limit: int | None = None
    image_size: int | None = None
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        for name in ("num_tasks", "limit", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; expected 1 or more")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; expected 0 or more")
        if not 0 <= self.validation < 1:
            raise InputError(
                f"validation is {self.validation}; expected a fraction of at least 0 and below 1"
            )
        if not 0 < self.test_fraction < 1:
            raise InputError(f"test_fraction is {self.test_fraction}; expected a fraction between 0 and 1")

    def num_tasks_of(self, most: int, what: str) -> int:
        """How many tasks, if there can be ``most``: there are as many of ``what``."""
        if self.num_tasks is not None and self.num_tasks > most:
            raise InputError(
                f"num_tasks is {self.num_tasks} but there are {most} {what}; pass at most {most}"
            )
        return most if self.num_tasks is None else self.num_tasks

    def classes_per_task(self, num_classes: int) -> list[list[int]]:
        """Every class id once, spread so that the sizes of tasks differ by at most one."""
        num_tasks = self.num_tasks_of(num_classes, "classes")
        order = self._order(num_classes)
        size, larger = divmod(num_classes, num_tasks)
        ends = np.cumsum([size + (task < larger) for task in range(num_tasks)]).tolist()
        return [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _order(self, num_classes: int) -> list[int]:
        if self.class_order is None:
            return np.random.default_rng(self.seed).permutation(num_classes).tolist()
        if sorted(self.class_order) != list(range(num_classes)):
            raise InputError(
                f"class_order has {len(self.class_order)} entries; expected each class id from 0 to "
                f"{num_classes - 1} exactly once"
            )
        return [int(c) for c in self.class_order]


def hold_out(labels: Tensor, fraction: float, class_names: Sequence[str] | None = None) -> Tensor:
    """Which samples are held out, bool ``(n,)``: at least one and never all of each class.

    The choice depends on the class id and its number of samples alone, not on a seed or the order of tasks.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for class_id in labels.unique().tolist():
        rows = (labels == class_id).nonzero().squeeze(1)
        if len(rows) < 2:
            named = class_id if class_names is None else class_names[class_id]
            raise InputError(f"class {named} has one sample, too few to hold one out of them; add samples")
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        chosen = np.random.default_rng([class_id, len(rows)]).permutation(len(rows))[:count]
        held[rows[torch.from_numpy(np.sort(chosen))]] = True
    return held


@dataclass(frozen=True, eq=False)
class Parts:
    """Rows of a store by their use, each int64 ``(k,)``; ``valid`` is ``None`` without validation."""

    train: Tensor
    test: Tensor
    valid: Tensor | None

    def with_validation(self, fraction: float, groups: Tensor, names: Sequence[str]) -> Parts:
        """A fraction of every group's training rows held out; ``groups`` has the number of each stored row's."""
        if fraction == 0:
            return self
        held = hold_out(groups[self.train], fraction, names)
        return Parts(self.train[~held], self.test, self.train[held])


def split_parts(store: ImageStore, options: TaskOptions) -> Parts:
    """Training, test and validation rows after the limit per class."""
    rows = torch.arange(len(store.labels))
    train = _first_of_each_class(rows[: store.num_train], store.labels, options.limit)
    test = _first_of_each_class(rows[store.num_train :], store.labels, options.limit)
    return Parts(train, test, None).with_validation(options.validation, store.labels, store.class_names)


def _first_of_each_class(rows: Tensor, labels: Tensor, limit: int | None) -> Tensor:
    if limit is None:
        return rows
    kept = [rows[labels[rows] == c][:limit] for c in labels[rows].unique().tolist()]
    return torch.cat(kept).sort().values if kept else rows


def class_stream(name: str, store: ImageStore, options: TaskOptions) -> StreamBenchmark:
    """A benchmark whose tasks have different classes."""
    classes = options.classes_per_task(len(store.class_names))
    task_of = torch.zeros(len(store.class_names), dtype=torch.int64)
    for task, ids in enumerate(classes):
        task_of[ids] = task
    return _benchmark(name, store, task_of[store.labels], classes, split_parts(store, options))


def task_stream(
    name: str,
    store: ImageStore,
    tasks: Tensor,
    task_names: Sequence[str],
    num_valid: int = 0,
    validation: float = 0.0,
) -> StreamBenchmark:
    """A benchmark whose tasks are given image by image, so that a class may occur in several.

    A task's classes are those of its training images, in the order of their ids: two tasks with the same classes give
    them the same labels.

    Args:
        name: Of the stream.
        store: The images.
        tasks: Each stored image's task, int64 ``(n,)``.
        task_names: The name of each task.
        num_valid: How many of the last images are for validation.
        validation: Fraction of every class's training images of a task that is, where none are.
    """
    rows, end = torch.arange(len(tasks)), len(tasks) - num_valid
    parts = Parts(rows[: store.num_train], rows[store.num_train : end], rows[end:] if num_valid else None)
    classes = [store.labels[parts.train][tasks[parts.train] == t].unique() for t in range(len(task_names))]
    if not num_valid:
        names = [f"{one} of task {task}" for task in task_names for one in store.class_names]
        parts = parts.with_validation(validation, tasks * len(store.class_names) + store.labels, names)
    benchmark = _benchmark(name, store, tasks, [ids.tolist() for ids in classes], parts)
    benchmark.task_names = list(task_names)
    return benchmark


def _benchmark(
    name: str, store: ImageStore, tasks: Tensor, classes: list[list[int]], parts: Parts
) -> StreamBenchmark:
    """A benchmark of the stored images, each in its task."""
    from streams.benchmark import make_benchmark

    return make_benchmark(
        _by_task(store, parts.train, tasks, classes),
        _by_task(store, parts.test, tasks, classes),
        None if parts.valid is None else _by_task(store, parts.valid, tasks, classes),
        classes=classes,
        class_names=store.class_names,
        name=name,
    )


def _by_task(store: ImageStore, rows: Tensor, tasks: Tensor, classes: list[list[int]]) -> list[ImageData]:
    """Each task's rows, with the position of its class in the task as label."""
    label_of = torch.zeros(len(store.class_names), dtype=torch.int64)
    data = []
    for task, ids in enumerate(classes):
        mine = rows[tasks[rows] == task]
        if len(mine) == 0:
            named = ", ".join(store.class_names[c] for c in ids[:3])
            raise InputError(f"task {task} (classes {named}) has no samples; add images or remove the class")
        label_of[ids] = torch.arange(len(ids))
        data.append(ImageData(store.images, mine, label_of[store.labels[mine]], store.mean, store.std))
    return data
