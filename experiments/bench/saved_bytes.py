"""What training keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.bench.measuring import Goal, Race
from experiments.bench.shared import CIFAR, NUM_CLASSES, at_task, images
from lifelong_ens.accounting.meter import saved_bytes
from lifelong_ens.convert import batch_ensemble
from lifelong_ens.networks.plain import resnet20

BOUND = 1.1


def saved_bytes_of_ensemble(
    device: torch.device, *, batch_size: int = 8, num_members: int = 4
) -> Iterator[Race]:
    """Bytes kept for backward by an ensemble of rank-1 members, against a plain network on the same rows.

    Args:
        device: Where.
        batch_size: Images, which all members see.
        num_members: How many.
    """
    x, y = images(batch_size, CIFAR, device)
    rows, labels = x.repeat(num_members, 1, 1, 1), y.repeat(num_members)
    ensemble = batch_ensemble(resnet20(NUM_CLASSES), num_members).to(device).train()
    plain = resnet20(NUM_CLASSES).to(device).train()
    yield _race(
        f"ResNet-20, {num_members} members, {len(rows)} rows",
        "batch_ensemble",
        lambda: _kept(ensemble, lambda: ensemble(x).flatten(0, 1), labels),
        lambda: _kept(plain, lambda: plain(rows), labels),
    )


def saved_bytes_of_later_task(device: torch.device, *, batch_size: int = 32) -> Iterator[Race]:
    """The same of a later task of batch_ensemble, whose shared weights are frozen, against a plain network in training.

    Args:
        device: Where.
        batch_size: Images.
    """
    x, y = images(batch_size, CIFAR, device)
    network = at_task(resnet20(), 1, device)
    plain = resnet20(NUM_CLASSES).to(device).train()
    yield _race(
        f"ResNet-20, {batch_size} rows",
        "batch_ensemble, second task",
        lambda: _kept(network, lambda: network(x, 1), y),
        lambda: _kept(plain, lambda: plain(x), y),
    )


def _race(case: str, name: str, ours: Callable[[], int], plain: Callable[[], int]) -> Race:
    contestants = {name: lambda: ours, "plain network": lambda: plain}
    return Race(case, contestants, (Goal("plain network", "<=", BOUND),), unit="B", timed=False)


def _kept(network: nn.Module, logits: Callable[[], Tensor], labels: Tensor) -> int:
    """Bytes of the storages that autograd keeps, each once, the network's own left out."""
    with saved_bytes(network) as kept:
        loss = F.cross_entropy(logits(), labels)
        total = sum(kept.values())
    loss.backward()
    return total
