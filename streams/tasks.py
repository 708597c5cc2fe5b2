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
        num_tasks: How many tasks.
        seed: Of the class order.
        class_order: Explicit order of the class ids; wins over ``seed``.
        validation: Fraction of every class's training samples, in [0, 1).
        limit: Samples per class, of training and of test images each.
        image_size: Height and width of the images.
    """

    num_tasks: int
    seed: int = 0
    class_order: Sequence[int] | None = None
    validation: float = 0.0
    limit: int | None = None
    image_size: int | None = None

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

    def classes_per_task(self, num_classes: int) -> list[list[int]]:
        """Every class id once, spread so that the sizes of tasks differ by at most one."""
        if self.num_tasks > num_classes:
            raise InputError(
                f"num_tasks is {self.num_tasks} but there are {num_classes} classes; "
                f"pass at most {num_classes}"
            )
        order = self._order(num_classes)
        size, larger = divmod(num_classes, self.num_tasks)
        ends = np.cumsum([size + (task < larger) for task in range(self.num_tasks)]).tolist()
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


def split_parts(store: ImageStore, options: TaskOptions) -> Parts:
    """Training, test and validation rows after the limit per class."""
    rows = torch.arange(len(store.labels))
    train = _first_of_each_class(rows[: store.num_train], store.labels, options.limit)
    test = _first_of_each_class(rows[store.num_train :], store.labels, options.limit)
    if options.validation == 0:
        return Parts(train, test, None)
    held = hold_out(store.labels[train], options.validation, store.class_names)
    return Parts(train[~held], test, train[held])


def _first_of_each_class(rows: Tensor, labels: Tensor, limit: int | None) -> Tensor:
    if limit is None:
        return rows
    kept = [rows[labels[rows] == c][:limit] for c in labels[rows].unique().tolist()]
    return torch.cat(kept).sort().values if kept else rows


def class_stream(name: str, store: ImageStore, options: TaskOptions) -> StreamBenchmark:
    """A benchmark whose tasks have different classes."""
    from streams.benchmark import make_benchmark

    classes = options.classes_per_task(len(store.class_names))
    parts = split_parts(store, options)
    return make_benchmark(
        _by_task(store, parts.train, classes),
        _by_task(store, parts.test, classes),
        None if parts.valid is None else _by_task(store, parts.valid, classes),
        classes=classes,
        class_names=store.class_names,
        name=name,
    )


def _by_task(store: ImageStore, rows: Tensor, classes: list[list[int]]) -> list[ImageData]:
    """Each task's rows, with the position of its class in the task as label."""
    task_of, label_of = (torch.zeros(len(store.class_names), dtype=torch.int64) for _ in range(2))
    for task, ids in enumerate(classes):
        task_of[ids] = task
        label_of[ids] = torch.arange(len(ids))
    tasks = task_of[store.labels[rows]]
    data = []
    for task, ids in enumerate(classes):
        mine = rows[tasks == task]
        if len(mine) == 0:
            named = ", ".join(store.class_names[c] for c in ids[:3])
            raise InputError(f"task {task} (classes {named}) has no samples; add images or remove the class")
        labels = label_of[store.labels[mine]]
        data.append(ImageData(store.images, mine, labels, store.mean, store.std))
    return data
