"""Proximal steps: what a penalty that makes zeros does to weights after a step on the loss alone; all work in place.

``prox(x) = argmin_w 1/2 ||w - x||^2 + rate * penalty(w)``. Unlike a step along the gradient of l1 or of group
lasso it leaves exact zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def step_size(optimizer: torch.optim.Optimizer) -> float:
    """How far a lasting gradient of 1 moves a weight in one step: the rate at which penalties are to be taken.

    The learning rate, over ``1 - momentum`` for SGD: the fixed points of step and proximal step are then the minima
    of loss and penalty together. The steps of Adam have no such rate, theirs is the bare learning rate.
    """
    group = optimizer.param_groups[0]
    return group["lr"] / (1 - group.get("momentum", 0.0))


@torch.no_grad()
def shrink(weights: Tensor, threshold: float) -> None:
    """Of ``threshold * ||w||_1``: every weight moves towards zero by the threshold, and stays there."""
    weights.copy_(torch.nn.functional.softshrink(weights, threshold))


@torch.no_grad()
def shrink_groups(parts: Sequence[Tensor], threshold: float) -> None:
    """Of ``threshold * sum_g ||w_g||_2``: the norm of every group becomes smaller by the threshold, or zero.

    Args:
        parts: Tensors ``(groups, ...)``; a group is the rows of the same index in all of them.
        threshold: At least 0.
    """
    squares = sum(part.reshape(len(part), -1).square().sum(dim=1) for part in parts)
    norm = torch.as_tensor(squares).sqrt()
    factor = (1 - threshold / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(min=0)
    for part in parts:
        part.mul_(factor.view(-1, *[1] * (part.dim() - 1)))
