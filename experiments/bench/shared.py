"""What several rows need: inputs, a training step, a network that is at a later task."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.bench.measuring import Call
from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
from lifelong_ens.networks.plain import mlp, resnet20

NUM_CLASSES = 10
CIFAR = (3, 32, 32)
DIGITS = (1, 28, 28)
# the two kinds of network that ensembles are measured on
ENSEMBLED: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "ResNet-20": (lambda: resnet20(NUM_CLASSES), CIFAR),
    "MLP 784-512-512": (lambda: mlp(NUM_CLASSES, hidden=(512, 512)), DIGITS),
}


def images(batch_size: int, shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images ``(batch, C, H, W)`` and labels ``(batch,)``."""
    x = torch.randn(batch_size, *shape, device=device)
    return x, torch.randint(NUM_CLASSES, (batch_size,), device=device)


def answering(run: Callable[[], Tensor]) -> Call:
    """The call of a forward pass without gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            return run()

    return call


def training_step(logits: Callable[[], Tensor], labels: Tensor, parameters: Iterable[nn.Parameter]) -> Call:
    """A whole step: forward, cross-entropy, backward, SGD with momentum over the parameters that learn.

    Args:
        logits: The forward pass, ``(rows, classes)``.
        labels: ``(rows,)``.
        parameters: Those that do not learn are left out.

    Returns:
        The call, which returns the logits.
    """
    optimizer = torch.optim.SGD([one for one in parameters if one.requires_grad], lr=0.01, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        out = logits()
        F.cross_entropy(out, labels).backward()
        optimizer.step()
        return out.detach()

    return step


def at_task(body: nn.Module, task: int, device: torch.device) -> BatchEnsembleNetwork:
    """A lifelong BatchEnsemble that has begun the task of this index, those before it finished."""
    network = BatchEnsembleNetwork(body)
    network.to(device)
    network.regrow([NUM_CLASSES] * task).begin_task(NUM_CLASSES)
    return network
