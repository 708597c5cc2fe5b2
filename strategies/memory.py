"""Images of earlier tasks, kept inside the network's state, and the base of the strategies that use them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import CLExperience
from torch import Tensor, nn

from lifelong_ens.errors import InputError
from lifelong_ens.networks.task import MultiHead
from lifelong_ens.training.augment import augment
from lifelong_ens.training.data import channels_last
from strategies.base import Strategy
from strategies.loader import evaluation_batches

Scale = tuple[Tensor, Tensor]


class Memory(nn.Module):
    """Labelled images of several tasks: ``n * (C * H * W + 8)`` bytes, and 8 bytes per channel for every task.

    Images are normalised as they come and go. They are stored as bytes where this brings them back to the bit, as for
    all of our streams but rotated ones; where an image of any task is not a byte per value, all are stored as float32.

    Attributes:
        images: uint8 or float32 ``(n, C, H, W)``; a task's images stand together.
        labels: int32 ``(n,)``.
        tasks: The network's task of each image, int32 ``(n,)``.
        mean: What bytes of a task are normalised with, ``(tasks, C)``; empty where images are floats.
        std: Likewise.
    """

    component = "buffer"
    images: Tensor
    labels: Tensor
    tasks: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("images", torch.empty(0, dtype=torch.uint8))
        self.register_buffer("labels", torch.empty(0, dtype=torch.int32))
        self.register_buffer("tasks", torch.empty(0, dtype=torch.int32))
        self.register_buffer("mean", torch.empty(0, 0))
        self.register_buffer("std", torch.empty(0, 0))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images ``(k, C, H, W)``, labels ``(k,)`` and the network's tasks ``(k,)`` at ``rows``."""
        tasks = self.tasks[rows].long()
        images = self.images[rows]
        if not images.is_floating_point():
            images = _normalised(images, self.mean[tasks], self.std[tasks])
        return images, self.labels[rows].long(), tasks

    def add(self, task: int, images: Tensor, labels: Tensor, scale: Scale | None) -> None:
        """Store images of a task that has none here.

        Args:
            task: The network's task.
            images: Normalised, ``(k, C, H, W)``.
            labels: ``(k,)``.
            scale: Mean and standard deviation, ``(C,)`` each, that bytes were normalised with; None if not bytes.
        """
        as_bytes = None if scale is None else _as_bytes(images, *scale)
        if scale is None or as_bytes is None or self.images.is_floating_point():
            # what is there becomes floats too
            everything = torch.arange(len(self), device=self.tasks.device)
            self.images = self.batch(everything)[0] if len(self) else self.images.float()
            self.mean, self.std = self.mean[:0], self.std[:0]
        else:
            images = as_bytes
            self.mean, self.std = (
                _with_row(table, task, row) for table, row in zip((self.mean, self.std), scale, strict=True)
            )
        images = images.to(self.images.device)
        self.images = torch.cat([self.images, images]) if len(self) else images
        self.labels = torch.cat([self.labels, labels.to(self.labels)])
        self.tasks = torch.cat([self.tasks, torch.full_like(labels, task).to(self.tasks)])

    def keep(self, shares: Mapping[int, int]) -> None:
        """Of every task keep its first so many images, of a task not named none."""
        parts = [(self.tasks == task).nonzero().squeeze(1)[:share] for task, share in shares.items()]
        rows = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
        self.images, self.labels, self.tasks = self.images[rows], self.labels[rows], self.tasks[rows]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # how much is remembered, and whether as bytes, is part of the state
        for name, buffer in self._buffers.items():
            if buffer is not None and (given := state_dict.get(f"{prefix}{name}")) is not None:
                setattr(self, name, torch.empty_like(given, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """As a stream does it: bytes ``(k, C, H, W)`` with a scale ``(C,)``, or one for each image ``(k, C)``."""
    return pixels.float().sub_(mean[..., None, None]).div_(std[..., None, None])


def _as_bytes(images: Tensor, mean: Tensor, std: Tensor) -> Tensor | None:
    """The bytes that normalise to exactly these images; None if there are none."""
    pixels = (images * std[:, None, None] + mean[:, None, None]).round().clamp(0, 255).to(torch.uint8)
    return pixels if torch.equal(_normalised(pixels, mean, std), images) else None


def _with_row(table: Tensor, index: int, row: Tensor) -> Tensor:
    """The table ``(rows, C)`` with ``row`` at ``index``, longer if need be."""
    grown = table.new_zeros(max(len(table), index + 1), len(row))
    if len(table):
        grown[: len(table)] = table
    grown[index] = row
    return grown


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of the positions of ``labels``, ``(n,)``, any beginning of which is balanced over classes."""
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    by_class = shuffled.argsort(stable=True)
    counts = shuffled.bincount()
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(order)) - first[shuffled[by_class]]
    return order[rank.argsort(stable=True)]


class RehearsalNetwork(MultiHead):
    """One body and a head per task, and a memory of images.

    Args:
        body: A network with ``num_features``, or a classifier whose last linear layer is taken off.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.memory = Memory()


class RehearsalStrategy(Strategy):
    """Keeps ``memory`` images in all, shared equally by the tasks so far, and in a task by its classes.

    They are drawn uniformly from each class when the task has been trained; when a new task takes its share, each
    earlier one gives up the last that it drew. Recalled images are augmented as new ones are.

    Args:
        network: What is trained.
        memory: How many images are kept, of all tasks together.
        options: As in ``Strategy``.

    Attributes:
        past: Rows of the memory that are not of the tasks in training, ``(n,)``, on the CPU.
    """

    network: RehearsalNetwork
    past: Tensor

    def __init__(self, *, network: RehearsalNetwork, memory: int, **options: Any) -> None:
        if memory < 0:
            raise InputError(f"memory is at least 0 images, not {memory}.")
        super().__init__(network=network, **options)
        self.memory_images = memory

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """Train the newest task, then remember some of its images."""
        tasks: dict[int, int] = self.model.tasks  # pyright: ignore
        present = torch.tensor([tasks[label] for label in self.experience.task_labels])  # pyright: ignore
        self.past = torch.isin(self.network.memory.tasks.cpu(), present, invert=True).nonzero().squeeze(1)
        seed = self._task_seed(self.network.num_tasks) + 2
        self._rows_generator = torch.Generator().manual_seed(seed)
        self._image_generator = torch.Generator(self.device).manual_seed(seed)
        self.extra_rows = self.recalled_rows()
        super().fit_task(validation)
        self._remember(torch.Generator().manual_seed(seed + 1))

    def recalled_rows(self) -> int:
        """Remembered rows that a step passes through the network beside its mini-batch; none here."""
        return 0

    def draw(self, count: int) -> Tensor:
        """Rows of the past, at most ``count``, ``(k,)``; at random and each once."""
        return self.past[torch.randperm(len(self.past), generator=self._rows_generator)[:count]]

    def recall(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images ``(k, C, H, W)``, augmented, labels ``(k,)`` and the network's tasks ``(k,)``."""
        images, labels, tasks = self.network.memory.batch(rows.to(self.device))
        return channels_last(augment(images, self.fit.augment, self._image_generator)), labels, tasks

    def _remember(self, generator: torch.Generator) -> None:
        memory, dataset = self.network.memory, self.experience.dataset  # pyright: ignore
        new = _rows_of_tasks(dataset, self.model.tasks)  # pyright: ignore
        known = sorted({*memory.tasks.tolist(), *new})
        shares = {
            task: max(math.ceil((self.memory_images - i) / len(known)), 0) for i, task in enumerate(known)
        }
        memory.keep({task: share for task, share in shares.items() if task not in new})
        labels = _labels(dataset)
        data = getattr(dataset, "image_data", None)
        scale = None if data is None else (data.mean, data.std)
        for task, rows in new.items():
            chosen = rows[balanced_order(labels[rows], generator)[: shares[task]]]
            if len(chosen):
                memory.add(task, _images(dataset, chosen), labels[chosen], scale)


def _labels(dataset: Any) -> Tensor:
    """The label of every sample, ``(n,)``."""
    data = getattr(dataset, "image_data", None)
    return (
        data.labels
        if data is not None
        else torch.from_numpy(np.fromiter(map(int, dataset.targets), np.int64))
    )


def _rows_of_tasks(dataset: Any, tasks: Mapping[int, int]) -> dict[int, Tensor]:
    """The positions of each task's samples, by the network's task."""
    labels = dataset.targets_task_labels
    if len(labels.uniques) == 1:
        return {tasks[int(next(iter(labels.uniques)))]: torch.arange(len(dataset))}
    values = np.fromiter(map(int, labels), np.int64)
    return {
        tasks[label]: torch.from_numpy((values == label).nonzero()[0]) for label in np.unique(values).tolist()
    }


def _images(dataset: Any, rows: Tensor) -> Tensor:
    """Normalised images at ``rows``, ``(k, C, H, W)``, unaugmented, on the CPU."""
    batches = evaluation_batches(dataset.subset(rows.tolist()), 256, torch.device("cpu"))
    return torch.cat([batch[0] for batch in batches])
