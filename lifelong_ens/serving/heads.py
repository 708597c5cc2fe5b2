"""The heads of many tasks as one table, so that a batch gathers the rows of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.networks.task import GATHERED_PER_HEAD, each_by_its_own


class SlotHeads(nn.Module):
    """Linear classifiers in slots, of any sizes, that can be replaced; it answers as ``Heads`` does.

    Attributes:
        weight: Rows of all heads, ``(room, num_features)``; those of a head lie together.
        bias: Likewise, ``(room,)``.
        start: Where the rows of each slot begin, int64 ``(slots,)``.
        count: How many there are.

    Args:
        num_features: What the heads read.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight, self.bias = torch.empty(0, num_features), torch.empty(0)
        self.start, self.count = torch.empty(2, 0, dtype=torch.long)
        self._used = 0

    def __len__(self) -> int:
        return len(self.count)

    def put(self, slot: int, weight: Tensor, bias: Tensor) -> None:
        """Write a head ``(classes, num_features)`` into a slot, or into a new one at the end."""
        size = len(bias)
        if slot == len(self):
            more = torch.zeros(1, dtype=torch.long, device=weight.device)
            self.start, self.count = (torch.cat([one.to(more), more]) for one in (self.start, self.count))
        if int(self.count[slot]) != size:
            # the rows that it had are left behind, until all are moved
            self.count[slot] = 0
            if self._used + size > len(self.bias):
                self._move(size, weight)
            self.start[slot], self.count[slot] = self._used, size
            self._used += size
        first = int(self.start[slot])
        self.weight[first : first + size], self.bias[first : first + size] = weight, bias

    def forward(self, features: Tensor, task: int | Tensor) -> Tensor:
        """Features ``(..., batch, num_features)`` to logits ``(..., batch, classes)``, padded with -inf if mixed."""
        if isinstance(task, int):
            return self._one(features, task)
        count = self.count[task]
        width = int(count.max())
        if len(task) * width * self.num_features > GATHERED_PER_HEAD * len(task.unique()):
            logits = features.new_full((*features.shape[:-1], width), -torch.inf)
            for one in task.unique().tolist():
                part = self._one(features[..., task == one, :], one)
                logits[..., task == one, : part.shape[-1]] = part
            return logits
        classes = torch.arange(width, device=task.device)
        beyond = classes >= count.unsqueeze(1)
        rows = (self.start[task].unsqueeze(1) + classes).masked_fill_(beyond, 0)
        bias = self.bias[rows].masked_fill_(beyond, -torch.inf)
        return each_by_its_own(features, F.embedding(rows, self.weight), bias)

    def _one(self, features: Tensor, slot: int) -> Tensor:
        own = slice(first := int(self.start[slot]), first + int(self.count[slot]))
        return F.linear(features, self.weight[own], self.bias[own])

    def _move(self, size: int, like: Tensor) -> None:
        """Make room for ``size`` more rows, and twice what is used; rows that no slot has any more are dropped."""
        spans = zip(self.start.tolist(), self.count.tolist(), strict=True)
        live = torch.tensor(
            [row for start, count in spans for row in range(start, start + count)], dtype=torch.long
        )
        room = 2 * (len(live) + size)
        weight, bias = like.new_zeros(room, self.num_features), like.new_zeros(room)
        weight[: len(live)], bias[: len(live)] = self.weight[live], self.bias[live]
        self.weight, self.bias, self._used = weight, bias, len(live)
        self.start = self.count.cumsum(0) - self.count
