"""Our networks as Avalanche models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import CLExperience
from avalanche.models import MultiTaskModule
from torch import Tensor

from lifelong_ens.errors import InputError
from lifelong_ens.networks.task import TaskNetwork


class TaskModel(MultiTaskModule):
    """A ``TaskNetwork`` as an Avalanche model, for our strategies and for Avalanche's own.

    It grows when it meets a new task label in training and never in evaluation; for a task that it has not learnt
    all classes are equally likely. Avalanche's own multi-head modules grow in evaluation too (0.6.0).
    """

    def __init__(self, network: TaskNetwork) -> None:
        super().__init__()
        self.network = network
        self.tasks: dict[int, int] = {}
        self._classes_asked = 1

    def adaptation(self, experience: CLExperience) -> None:
        """Add the tasks of a training experience that are new; Avalanche calls it before every experience."""
        classes = _classes_of_tasks(experience)
        self._classes_asked = max(classes.values())
        if not self.training:
            return
        for label, num_classes in classes.items():
            if label not in self.tasks:
                self.tasks[label] = self.network.num_tasks
                self.network.begin_task(num_classes)
            elif self.network.frozen_past:
                raise InputError(
                    f"task {label} comes a second time; {type(self.network).__name__} learns every task once."
                )

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of rows with the given task labels, ``(batch,)``."""
        labels = task_labels.unique().tolist()
        if any(label not in self.tasks for label in labels):
            return x.new_zeros(len(x), self._classes_asked)
        if len(labels) == 1:
            return self.network(x, self.tasks[labels[0]])
        return self.network(x, task_indices(task_labels, self.tasks))


def _classes_of_tasks(experience: CLExperience) -> dict[int, int]:
    """The number of classes of every task label of an experience, from the labels of its samples."""
    dataset: Any = experience.dataset  # pyright: ignore
    labels = dataset.targets_task_labels.uniques
    if len(labels) == 1:
        return {int(next(iter(labels))): int(max(dataset.targets.uniques)) + 1}
    targets, tasks = (
        np.fromiter(map(int, values), int) for values in (dataset.targets, dataset.targets_task_labels)
    )
    return {int(label): int(targets[tasks == label].max()) + 1 for label in np.unique(tasks)}


def task_indices(labels: Tensor, tasks: Mapping[int, int]) -> Tensor:
    """Task labels of rows to indices of tasks in the order they were learnt."""
    table = torch.zeros(max(tasks) + 1, dtype=torch.long, device=labels.device)
    for label, index in tasks.items():
        table[label] = index
    return table[labels]
