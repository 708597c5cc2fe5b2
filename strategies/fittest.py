"""The earlier task whose features tell a new task's classes apart best."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from avalanche.benchmarks import CLExperience
from torch import Tensor

from lifelong_ens.training.loop import evaluating
from strategies.base import Strategy
from strategies.loader import evaluation_batches


def fittest_task(strategy: Strategy, validation: Sequence[CLExperience], seed: int) -> int:
    """The earlier task to start the newest from: the one whose features give the highest accuracy, the first if equal.

    A nearest-class-mean classifier on the features of each earlier task is fitted on the new task's training images and
    scored on its validation images; without those, on a random fifth of the training images, kept out of the means.
    Every image passes through every earlier task once, and the meter counts it.

    Args:
        strategy: At the start of a task, its network a ``BatchEnsembleNetwork``.
        validation: Held-out experiences of the task; may be empty.
        seed: Of what is held out where the stream has no validation images.
    """
    features, labels = _features(strategy, strategy.adapted_dataset)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    if validation:
        parts = [_features(strategy, one.dataset) for one in validation]  # pyright: ignore
        features = torch.cat([features, *(part for part, _ in parts)], dim=1)
        held_out = torch.cat([held_out, torch.ones(sum(len(part) for _, part in parts), dtype=torch.bool)])
        labels = torch.cat([labels, *(part for _, part in parts)])
    else:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        held_out[order[: len(labels) // 5]] = True
    scores = [_nearest_mean_accuracy(one, labels, held_out) for one in features]
    return max(range(len(scores)), key=scores.__getitem__)


def _features(strategy: Strategy, dataset: Any) -> tuple[Tensor, Tensor]:
    """Features ``(earlier tasks, images, members * features)`` and labels ``(images,)``, on the CPU."""
    network: Any = strategy.network
    features, labels = [], []
    batches = evaluation_batches(dataset, strategy.eval_mb_size, strategy.device)
    with evaluating(network), closing(strategy.counted(batches, shared=False)) as counted:
        for x, y, _ in counted:
            members = [network.member_features(x, task) for task in range(network.num_tasks - 1)]
            features.append(torch.stack([one.transpose(0, 1).flatten(1) for one in members]).float().cpu())
            labels.append(y.cpu())
    return torch.cat(features, dim=1), torch.cat(labels)


def _nearest_mean_accuracy(features: Tensor, labels: Tensor, held_out: Tensor) -> float:
    """Share of the held-out rows that are nearest to the mean of their own class's other rows."""
    known, known_labels = features[~held_out], labels[~held_out]
    classes = known_labels.unique()
    means = torch.stack([known[known_labels == one].mean(dim=0) for one in classes])
    nearest = classes[torch.cdist(features[held_out], means).argmin(dim=1)]
    return float((nearest == labels[held_out]).double().mean())
