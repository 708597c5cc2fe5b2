"""Layers that use a subset of their weights for each task.

A masked layer runs dense: its weights are multiplied out to the shape of the layer, zeros included, and its FLOPs are
those of the dense layer. What a mask saves is storage: bits (``lifelong_ens.layers.bits``) in place of numbers.
"""

from __future__ import annotations

import copy
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.layers.bank import Bank, Selection
from lifelong_ens.layers.structured import fill_layer


def largest(values: Tensor, count: int) -> Tensor:
    """A mask of exactly ``count`` of the largest ``values``, in their shape; among equals the first come first."""
    flat = values.flatten()
    if count <= 0 or count >= len(flat):
        return torch.full_like(values, count > 0, dtype=torch.bool)
    threshold = flat.kthvalue(len(flat) - count + 1).values
    above, equal = flat > threshold, flat == threshold
    # without a wait for the device: equals count up to what is still missing
    kept = above | (equal & (equal.cumsum(0) <= count - above.sum()))
    return kept.view(values.shape)


class MaskedLayer(nn.Module):
    """A linear or convolution layer whose weight is another for each task; a subclass says which.

    The task is the selected member, one for all rows. A bias is the layer's own, or a row of a bank for each task.

    Args:
        layer: The plain layer, which becomes a part of this one.
        selection: The network's selection.
        bias: A bias ``per_member``, or one ``shared``.
    """

    def __init__(self, layer: nn.Module, selection: Selection, bias: str) -> None:
        super().__init__()
        self.layer, self.selection = layer, selection
        self.private_bias: Bank | None = None
        own = layer._parameters.get("bias")
        if bias == "per_member" and own is not None:
            self.private_bias = Bank(own.detach().unsqueeze(0), "bias")
            layer.bias = None  # pyright: ignore
        self.train(layer.training)

    @property
    def weight(self) -> nn.Parameter:
        """The layer's whole weight, before any mask."""
        return self.layer.weight  # pyright: ignore

    @abstractmethod
    def task_weight(self, task: int) -> Tensor:
        """The dense weight that a task uses, zero where its mask is; -1 is the task in training."""

    def forward(self, x: Tensor) -> Tensor:
        """The plain layer's shapes, in and out."""
        task = self.selection.members
        if not isinstance(task, int):
            raise ValueError(f"{type(self).__name__} runs one task at a time; select a single member.")
        bias = self.layer.bias if self.private_bias is None else self.private_bias.row(task)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, self.task_weight(task), bias)  # pyright: ignore
        return self.layer._conv_forward(x, self.task_weight(task), bias)  # pyright: ignore

    def export(self, member: int) -> nn.Module:
        """One task as the plain layer, the mask in its weight."""
        plain = copy.deepcopy(self.layer)
        bias = self.layer.bias if self.private_bias is None else self.private_bias.row(member)
        fill_layer(plain, self.task_weight(member), bias)  # pyright: ignore
        return plain.train(self.training)
