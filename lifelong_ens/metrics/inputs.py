"""What the metrics of predictions ask of their input, checked in one place."""

from __future__ import annotations

import torch
from torch import Tensor


def check_log_probs(log_probs: Tensor) -> Tensor:
    """``log_probs`` ``(members, batch, classes)`` in float32 or wider.

    Raises:
        ValueError: Of another number of dimensions, or no member.
    """
    if log_probs.dim() != 3 or log_probs.shape[0] == 0:
        raise ValueError(f"log_probs: expected (members, batch, classes), got {tuple(log_probs.shape)}")
    return at_least_float32(log_probs)


def check_labels(predictions: Tensor, labels: Tensor) -> None:
    """Refuse ``labels`` that are not one per example of ``predictions`` ``(batch, ...)``."""
    if labels.shape != predictions.shape[:1]:
        raise ValueError(f"labels: expected {tuple(predictions.shape[:1])}, got {tuple(labels.shape)}")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def nan_of(value: Tensor, source: Tensor) -> Tensor:
    """``value``, or NaN where ``source`` holds a NaN: counts and orders would hide it."""
    return torch.where(source.isnan().any(), value.new_tensor(float("nan")), value)
