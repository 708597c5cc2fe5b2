"""Batches of a stream's images, gathered whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from avalanche.benchmarks import CLExperience, DatasetExperience
from torch import Tensor
from torch.utils.data import DataLoader

from lifelong_ens.training.augment import Augmentation, augment
from lifelong_ens.training.data import channels_last
from lifelong_ens.training.seeding import generator_on

Batch = list[Tensor]


class BatchLoader:
    """Whole batches of a dataset, gathered at once, augmented on the device; one pass each time it is iterated.

    Args:
        dataset: One of our stream's datasets, or anything that Avalanche made of it.
        batch_size: Images per batch; the last may be smaller.
        device: Where the batches go.
        seed: Of the order and of the augmentation; None for the dataset's order as it is.
        augmentation: As in ``Fit``.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        augmentation: Augmentation = "none",
    ) -> None:
        self.dataset, self.batch_size, self.device = dataset, batch_size, device
        self.shuffled = seed is not None
        self.augmentation: Augmentation = augmentation
        # the order is drawn on the CPU, so that it is the same on every device; augmentation where the images are
        self.order_generator = torch.Generator().manual_seed(seed or 0)
        self.image_generator = generator_on(device, seed or 0)
        labels = dataset.targets_task_labels.uniques
        # rows of one task need no look at their labels
        self.task_label: int | None = next(iter(labels)) if len(labels) == 1 else None

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        count = len(self.dataset)
        order = (
            torch.randperm(count, generator=self.order_generator) if self.shuffled else torch.arange(count)
        )
        for x, y, task_labels in self.dataset.batches(order, self.batch_size, self.device):
            yield [channels_last(augment(x, self.augmentation, self.image_generator)), y, task_labels]


def evaluation_batches(dataset: Any, batch_size: int, device: torch.device) -> Iterable[Batch]:
    """Batches in the dataset's order, gathered whole where it can do that."""
    if hasattr(dataset, "batch"):
        return BatchLoader(dataset, batch_size, device)
    loader = DataLoader(dataset.eval(), batch_size, collate_fn=dataset.collate_fn)
    return ([part.to(device) for part in batch] for batch in loader)


def together(experiences: Iterable[CLExperience]) -> CLExperience:
    """All experiences as one, whose samples keep their task labels."""
    parts = list(experiences)
    dataset = parts[0].dataset  # pyright: ignore
    for part in parts[1:]:
        dataset = dataset.concat(part.dataset)  # pyright: ignore
    return experience_of(dataset, parts[0])


def experience_of(dataset: Any, origin: CLExperience) -> CLExperience:
    """An experience of other images in the stream that ``origin`` belongs to."""
    experience = DatasetExperience(dataset=dataset, current_experience=0)
    experience.task_labels = sorted(dataset.targets_task_labels.uniques)  # pyright: ignore
    experience._origin_stream = origin.origin_stream  # pyright: ignore
    return experience


def hold_out(dataset: Any, share: float, seed: int) -> tuple[Any, Any]:
    """A dataset without a share of each class's images, and a dataset of these.

    Args:
        dataset: Anything that Avalanche made.
        share: In (0, 1); rounded up, but a class keeps at least one image.
        seed: Of the choice.
    """
    labels = torch.tensor([int(label) for label in dataset.targets])
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero().squeeze(1)
        count = min(math.ceil(share * len(rows)), len(rows) - 1)
        held[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    kept, out = (dataset.subset(part.nonzero().squeeze(1).tolist()) for part in (~held, held))
    return kept, out
