"""Losses of classifiers whose logits may be those of several members."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def member_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of logits ``(batch, classes)``, or its mean over members, ``(members, batch, classes)``."""
    if logits.dim() == 2:
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.repeat(len(logits)), label_smoothing=label_smoothing
    )
