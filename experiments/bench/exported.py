"""What leaves a network with members as a plain one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from experiments.bench.measuring import Goal, Race
from experiments.bench.shared import NUM_CLASSES, answering, at_task, images
from lifelong_ens.convert import batch_ensemble

PLAIN = "torchvision's network"


def exported(
    device: torch.device, *, batch_sizes: tuple[int, ...] = (1, 32), image_size: int = 64
) -> Iterator[Race]:
    """An exported task and an exported member, against the torchvision ResNet-18 that it was made of.

    Args:
        device: Where.
        batch_sizes: Images.
        image_size: Their height and width.
    """
    network = at_task(resnet18(num_classes=NUM_CLASSES), 1, device)
    network.finish_task()
    ensemble = batch_ensemble(resnet18(num_classes=NUM_CLASSES).to(device), 4)
    task, member = network.export_task(1), ensemble.export_member(1).eval()
    for size in batch_sizes:
        x = images(size, (3, image_size, image_size), device)[0]
        for name, small, state in (
            ("export_task", task, _state_of_task(task)),
            ("export_member", member, member.state_dict()),
        ):
            plain = resnet18(num_classes=NUM_CLASSES).to(device).eval()
            plain.load_state_dict(state)
            yield Race(
                f"ResNet-18, {image_size}x{image_size}, batch {size}",
                {name: partial(answering, partial(small, x)), PLAIN: partial(answering, partial(plain, x))},
                (Goal(PLAIN, "~", 1.0, same_answer=True),),
            )


def _state_of_task(task: nn.Module) -> dict[str, Tensor]:
    """The numbers of a task, a body and its head, under torchvision's names."""
    body, head = task.children()
    return body.state_dict() | head.state_dict(prefix="fc.")
