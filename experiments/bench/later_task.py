"""Training a later task, whose shared weights are frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from experiments.bench.measuring import Call, Goal, Race
from experiments.bench.shared import CIFAR, NUM_CLASSES, at_task, images, training_step
from lifelong_ens.networks.plain import lenet5, resnet18

NETWORKS: dict[str, Callable[[int | None], nn.Module]] = {
    "ResNet-18, width 20": lambda classes: resnet18(classes, width=20),
    "LeNet-5": lenet5,
}


def step_later_task(device: torch.device, *, batch_size: int = 64) -> Iterator[Race]:
    """A training step of batch_ensemble from the second task on, against the vanilla network's (published: 1.11x).

    Args:
        device: Where.
        batch_size: Images of 3x32x32 per step.
    """
    x, y = images(batch_size, CIFAR, device)
    for name, build in NETWORKS.items():

        def ours(build: Callable[[int | None], nn.Module] = build) -> Call:
            network = at_task(build(None), 1, device)
            return training_step(lambda: network(x, 1), y, network.parameters())

        def vanilla(build: Callable[[int | None], nn.Module] = build) -> Call:
            network = build(NUM_CLASSES).to(device)
            return training_step(lambda: network(x), y, network.parameters())

        yield Race(
            f"{name}, batch {batch_size}",
            {"batch_ensemble, second task": ours, "vanilla network": vanilla},
            (Goal("vanilla network", "<=", 0.75),),
        )
