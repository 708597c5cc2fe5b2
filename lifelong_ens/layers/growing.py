"""Layers that gain units from task to task; a stamp says how many of them each task uses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from lifelong_ens.layers.structured import run_layer


class Stamps:
    """How many channels each group has in each task, and which task the call in progress belongs to.

    Attributes:
        table: A row for each task, a size for each group.
    """

    def __init__(self) -> None:
        self.table: list[list[int]] = []
        self._task: int | None = None

    @property
    def task(self) -> int:
        """The task selected by ``of``."""
        if self._task is None:
            raise ValueError("a growing layer runs one task at a time; select it with `of(task)`.")
        return self._task

    @property
    def newest(self) -> int:
        """The task that may still grow."""
        return len(self.table) - 1

    @contextmanager
    def of(self, task: int) -> Iterator[None]:
        """Select a task inside a with-block."""
        before, self._task = self._task, task
        try:
            yield
        finally:
            self._task = before


class GrowingLayer(nn.Module):
    """A linear or convolution layer that gains rows (units) and columns (inputs); a task uses the first of them.

    What the newest task added are leaves of their own until ``commit``, so that training them moves nothing else.

    Attributes:
        layer: The plain layer with the weights that earlier tasks left, ``(rows, columns, *kernel)``.
        new_rows: Weights of the newest task's units, ``(k, columns and new columns, *kernel)``, or None.
        new_columns: What older units read from new ones, ``(rows, j, *kernel)``, or None.
        new_bias: ``(k,)``, or None.

    Args:
        layer: What grows.
        stamps: The network's sizes.
        writes: Index of the group of channels that it writes.
        reads: Index of the group that it reads; None for the network's input.
    """

    new_rows: nn.Parameter | None
    new_columns: nn.Parameter | None
    new_bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, stamps: Stamps, writes: int, reads: int | None, width: int) -> None:
        super().__init__()
        self.layer: Any = layer
        self.stamps, self.writes, self.reads = stamps, writes, reads
        # numbers read of each channel: more than one after a flattened map
        self.positions = self.layer.weight.shape[1] // width if reads is not None else 1
        for name in ("new_rows", "new_columns", "new_bias"):
            self.register_parameter(name, None)

    def shape(self, task: int) -> tuple[int, int]:
        """Rows and columns that a task uses."""
        sizes = self.stamps.table[task]
        columns = self.layer.weight.shape[1] if self.reads is None else sizes[self.reads] * self.positions
        return sizes[self.writes], columns

    def forward(self, x: Tensor) -> Tensor:
        """The layer with the rows and columns of the selected task."""
        return run_layer(self.layer, x, *self.task_tensors(self.stamps.task))

    def task_tensors(self, task: int) -> tuple[Tensor, Tensor | None]:
        """Weight ``(rows, columns, *kernel)`` and bias ``(rows,)`` of a task."""
        weight, bias = self.layer.weight, self.layer.bias
        if task == self.stamps.newest:
            if self.new_columns is not None:
                weight = torch.cat([weight, self.new_columns], dim=1)
            if self.new_rows is not None:
                weight = torch.cat([weight, self.new_rows])
            if self.new_bias is not None:
                bias = torch.cat([bias, self.new_bias])
            return weight, bias
        rows, columns = self.shape(task)
        if weight.shape[:2] == (rows, columns):
            return weight, bias
        # contiguous: the same numbers in the same places as when the task was trained, so the same bits come out
        return weight[:rows, :columns].contiguous(), None if bias is None else bias[:rows]

    def grow(self, rows: int, columns: int) -> None:
        """Append rows, and columns (in channels), to what the newest task has, drawn as torch's layers draw theirs."""
        with torch.no_grad():
            weight, bias = self.task_tensors(self.stamps.newest)
            columns *= self.positions
            fan_in = (weight.shape[1] + columns) * weight[0, 0].numel()
            bound = fan_in**-0.5
            beside = weight.new_empty(len(weight), columns, *weight.shape[2:]).uniform_(-bound, bound)
            weight = torch.cat([weight, beside], dim=1)
            below = weight.new_empty(rows, *weight.shape[1:]).uniform_(-bound, bound)
            weight = torch.cat([weight, below])
            if bias is not None:
                bias = torch.cat([bias, bias.new_empty(rows).uniform_(-bound, bound)])
        self._set_new(weight, bias)

    def keep(self, rows: Tensor, columns: Tensor | None) -> None:
        """Keep some of the newest task's rows and columns, ``(rows,)`` and ``(channels,)`` booleans, old ones all."""
        with torch.no_grad():
            weight, bias = self.task_tensors(self.stamps.newest)
            if columns is not None:
                weight = weight[:, columns.repeat_interleave(self.positions)]
            self._set_new(weight[rows], None if bias is None else bias[rows])

    def assign(self, weight: Tensor, bias: Tensor | None) -> None:
        """Give the newest task other tensors, at least as large as the layer's own; earlier tasks use their slice."""
        with torch.no_grad():
            rows, columns = self.layer.weight.shape[:2]
            self.layer.weight.copy_(weight[:rows, :columns])
            if bias is not None:
                self.layer.bias.copy_(bias[:rows])
            self._set_new(weight, bias)

    def discard(self) -> None:
        """Forget what the newest task added."""
        self.new_rows = self.new_columns = self.new_bias = None

    def commit(self) -> None:
        """Append what the newest task added to the layer's own tensors and freeze them."""
        with torch.no_grad():
            weight, bias = self.task_tensors(self.stamps.newest)
        if self.new_rows is not None or self.new_columns is not None:
            self.layer.weight = nn.Parameter(weight.detach().contiguous())
            if bias is not None:
                self.layer.bias = nn.Parameter(bias.detach())
        self.discard()
        self.layer.requires_grad_(False)

    def _set_new(self, weight: Tensor, bias: Tensor | None) -> None:
        """Make leaves of everything beyond the layer's own tensors."""
        rows, columns = self.layer.weight.shape[:2]
        has_rows, has_columns = len(weight) > rows, weight.shape[1] > columns
        self.new_rows = nn.Parameter(weight[rows:].clone()) if has_rows else None
        self.new_columns = nn.Parameter(weight[:rows, columns:].clone()) if has_columns else None
        self.new_bias = nn.Parameter(bias[rows:].clone()) if bias is not None and has_rows else None


class GrowingNorm(nn.ModuleList):
    """A batch norm of its own for every task, as wide as the task's channels; only the newest one learns.

    Args:
        norm: The plain norm that the first task starts from.
        stamps: The network's sizes.
        reads: Index of the group of channels that it normalises.
    """

    def __init__(self, norm: nn.Module, stamps: Stamps, reads: int) -> None:
        super().__init__()
        # a template, not a part: kept out of the state
        self.template: list[Any] = [norm]
        self.stamps, self.reads = stamps, reads

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, C, ...)`` in and out."""
        return self[self.stamps.task](x)

    def add(self) -> None:
        """A norm for a new task: affine numbers as the last task left them, statistics at their start."""
        norm: Any = copy.deepcopy(self[-1] if len(self) else self.template[0])
        self.requires_grad_(False)
        if len(self):
            norm.reset_running_stats()
        self.append(norm.requires_grad_(True))
        self.train(self.training)

    def restart(self) -> None:
        """The newest task's norm as ``add`` made it."""
        self.pop(-1)
        self.add()

    def resize(self, kept: Tensor, new: int) -> None:
        """The newest task's norm with some of its channels, ``(C,)`` booleans, and ``new`` more behind them."""
        norm: Any = self[-1]
        norm.num_features = int(kept.sum()) + new
        for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            old = getattr(norm, name)
            if old is not None:
                values = torch.cat([old.detach()[kept], old.new_full((new,), start)])
                setattr(norm, name, nn.Parameter(values) if isinstance(old, nn.Parameter) else values)

    def train(self, mode: bool = True) -> Self:
        """Only the newest norm is ever in training mode."""
        self.training = mode
        for index, norm in enumerate(self):
            norm.train(mode and index == len(self) - 1)
        return self
