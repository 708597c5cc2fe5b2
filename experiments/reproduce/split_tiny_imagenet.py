"""Tiny-ImageNet in ten tasks on the reduced ResNet-18: accuracy and cost of all strategies."""

from __future__ import annotations

from experiments.reproduce.declaration import Quick, Reproduction
from experiments.reproduce.shared import ALL_STRATEGIES, LARGE_FIT, TINY_IMAGENET

REPRODUCTION = Reproduction(
    name="split_tiny_imagenet",
    summary="all strategies on ten tasks of Tiny-ImageNet with GEM's reduced ResNet-18",
    stream="split_tiny_imagenet",
    stream_options={"num_tasks": 10},
    network="resnet18",
    network_options={"width": 20},
    fit=LARGE_FIT,
    seeds=1,
    rows=ALL_STRATEGIES,
    quick=Quick(
        fit={"epochs": 1}, stream={"limit": 20}, strategies={"structured_ensemble": {"mask_epochs": 1}}
    ),
    images=TINY_IMAGENET,
    notes=(
        "Tasks are of equal size over the classes that the folder has; all 200 make ten tasks of twenty, part of them "
        "makes smaller ones, and the table says how many there were.",
    ),
)
