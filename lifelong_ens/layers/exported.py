"""What exports are made of beside torch's own modules: plain networks side by side, and the mean of what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ExportedMembers(nn.ModuleList):
    """Plain networks that all see every input, one after the other; each is an element of the list."""

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        """What each answers, stacked: ``(members, batch, ...)``; of networks that return tuples, a tuple of such."""
        return joined([member(x, *more, **named) for member in self], torch.stack)


class LogMeanProbability(nn.Module):
    """What members say together: ``log_mean_probability`` as a module."""

    def forward(self, logits: Tensor) -> Tensor:
        """``(members, batch, classes)`` to ``(batch, classes)``."""
        return log_mean_probability(logits)


def log_mean_probability(logits: Tensor) -> Tensor:
    """What members say together: the logarithm of their mean probability, of their ``(members, batch, classes)``."""
    return torch.logsumexp(torch.log_softmax(logits, dim=-1), dim=0) - math.log(len(logits))


def joined(answers: list[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """What several passes gave as one; of networks that return tuples, each tensor of them."""
    first = answers[0]
    if isinstance(first, tuple):
        return tuple(joined(list(parts), join) for parts in zip(*answers, strict=True))
    return join(answers) if isinstance(first, Tensor) else first
