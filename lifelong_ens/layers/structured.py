"""Layers whose output units belong to tasks: each task switches on those of the tasks up to it.

Source: the continual-learning form of Structured Ensembles (Pomponi, Scardapane and Uncini, Neural Networks 144,
2021; the authors' package ``continual-learning`` 0.1.6.5, module SuperMask).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.layers.bank import Members, Selection
from lifelong_ens.layers.bits import pack, unpack
from lifelong_ens.layers.norm import MemberBatchNorm

UNIT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Units(Selection):
    """The selection of a structured network: ``members`` is the task; and what the last layer switched off.

    A norm that is given the very tensor that a layer returned switches off the same units as that layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._output: Tensor | None = None
        self._active: Tensor | None = None

    @property
    def task(self) -> int:
        """The task that all rows belong to."""
        if not isinstance(self.members, int):
            raise ValueError("a structured layer runs one task at a time; select it with `of(task)`.")
        return self.members

    @contextmanager
    def of(self, members: Members) -> Iterator[None]:
        """Select a task inside a with-block; see ``Selection.of``."""
        with super().of(members):
            try:
                yield
            finally:
                # it would keep the graph of the last layer alive
                self._output = self._active = None

    def note(self, output: Tensor, active: Tensor | None) -> None:
        """A layer returned ``output`` with only the units ``active``, ``(units,)``; None for all."""
        self._output, self._active = output, active

    def active_in(self, x: Tensor) -> Tensor | None:
        """Which channels of ``x`` are on, ``(channels,)``; None where all are or where that is not known."""
        return self._active if x is self._output else None


class Masks(nn.Module):
    """Packed bits: one row per task, the units that are on in it; ``(tasks, ceil(units / 8))`` bytes."""

    component = "mask"
    bits: Tensor

    def __init__(self, num_units: int) -> None:
        super().__init__()
        self.num_units = num_units
        self.register_buffer("bits", torch.zeros(0, -(-num_units // 8), dtype=torch.uint8))

    def extra_repr(self) -> str:
        """The part of ``repr`` between the brackets."""
        return f"{len(self.bits)} x {self.num_units} bits"

    def row(self, task: int) -> Tensor:
        """Units that are on in a task, ``(units,)`` booleans; none before the first."""
        if task < 0:
            return torch.zeros(self.num_units, dtype=torch.bool, device=self.bits.device)
        return unpack(self.bits[task], self.num_units)

    def append(self) -> None:
        """A task more, with the units of the one before."""
        self.bits = torch.cat([self.bits, pack(self.row(len(self.bits) - 1)).unsqueeze(0)])

    def switch_on(self, units: Tensor) -> None:
        """Give the newest task these units too, ``(units,)`` booleans."""
        self.bits[-1] = pack(self.row(len(self.bits) - 1) | units)


class StructuredLayer(nn.Module):
    """A linear or convolution layer whose rows (output units) belong to the task that first switched them on.

    The layer's own tensors are never trained. The rows of the task in training are leaves of their own, committed
    when it ends: whatever the optimizer does, momentum and weight decay included, reaches no other row.

    Attributes:
        masks: Which units are on in each task, earlier tasks' included.
        scale: While units are being chosen, ``s`` of the network's newest task, ``(units,)``; otherwise None.
        new_weight: Rows in training, ``(k, in, ...)``, or None.
        new_bias: Their biases, ``(k,)``, or None.

    Args:
        layer: A linear or convolution layer; its initial weights are where every unit starts.
        units: The network's selection.
    """

    scale: nn.Parameter | None
    new_weight: nn.Parameter | None
    new_bias: nn.Parameter | None
    new_units: Tensor | None

    def __init__(self, layer: nn.Module, units: Units) -> None:
        super().__init__()
        self.layer: Any = layer.requires_grad_(False)
        self.units = units
        self.masks = Masks(len(self.layer.weight))
        for name in ("scale", "new_weight", "new_bias"):
            self.register_parameter(name, None)
        self.register_buffer("new_units", None, persistent=False)

    @property
    def num_tasks(self) -> int:
        """How many tasks have a mask."""
        return len(self.masks.bits)

    def free_units(self, task: int) -> Tensor:
        """Units that no task before this one uses, ``(units,)`` booleans."""
        return ~self.masks.row(task - 1)

    def start_scale(self) -> nn.Parameter:
        """Multiply every unit by a fresh ``s ~ N(0, 1)`` until units are chosen; returns ``s``, ``(units,)``."""
        weight = self.layer.weight
        self.scale = nn.Parameter(torch.randn(self.masks.num_units).to(weight))
        return self.scale

    def choose(self, units: Tensor) -> None:
        """Give the newest task the free units ``(units,)`` booleans and train their rows, and only these."""
        self.scale = None
        self.masks.switch_on(units)
        self.new_units = units.nonzero().squeeze(1)
        if len(self.new_units):
            self.new_weight = nn.Parameter(self.layer.weight[self.new_units])
            bias = self.layer.bias
            self.new_bias = None if bias is None else nn.Parameter(bias[self.new_units])

    def commit(self) -> None:
        """Write the rows in training back; nothing trains them again."""
        with torch.no_grad():
            for name, new in (("weight", self.new_weight), ("bias", self.new_bias)):
                if new is not None:
                    getattr(self.layer, name)[self.new_units] = new
        self.scale = self.new_weight = self.new_bias = self.new_units = None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the task's units alone; while units are chosen, with all of them scaled."""
        if self.scale is not None:
            y = run_layer(self.layer, x, self.layer.weight, self.layer.bias)
            y = y * self.scale.to(y.dtype).view(_unit_shape(self.layer, y))
            self.units.note(y, None)
            return y
        active = self.masks.row(self.units.task)
        y = run_layer(self.layer, x, *self.masked(self.units.task, active))
        self.units.note(y, active)
        return y

    def masked(self, task: int, active: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a task, in the layer's shapes, zero at units that are off."""
        in_training = task == self.num_tasks - 1
        off, parts = ~active, []
        for name, new in (("weight", self.new_weight), ("bias", self.new_bias)):
            part = getattr(self.layer, name)
            if part is not None:
                part = part.masked_fill(off.view(-1, *[1] * (part.dim() - 1)), 0)
                if in_training and new is not None and self.new_units is not None:
                    part = part.index_copy(0, self.new_units, new)
            parts.append(part)
        return parts[0], parts[1]


def run_layer(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer on ``x`` with other tensors in place of its own."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def _unit_shape(layer: nn.Module, y: Tensor) -> list[int]:
    """The shape in which one number per unit broadcasts over ``y``."""
    axis = y.dim() - 1 if isinstance(layer, nn.Linear) else 1
    return [-1 if one == axis else 1 for one in range(y.dim())]


class StructuredBatchNorm(MemberBatchNorm):
    """Batch normalisation with affine rows and statistics for each task, off where the layer before it is.

    Without that, a unit that is off would leave the norm as its shift: no longer zero, and not to be cut out.

    Args:
        norm: The plain norm whose numbers the first task starts from.
        units: The network's selection.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, units: Units) -> None:
        super().__init__(norm, 1, units, private_affine=True)
        self.units = units
        self._active: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, C, ...)`` in and out."""
        self._active = self.units.active_in(x)
        y = super().forward(x)
        if self._active is not None and self.private_weight is None:
            y = y * self._active.to(y.dtype).view(1, -1, *[1] * (y.dim() - 2))
        self._active = None
        return y

    def _rows(self, name: str, members: Members) -> Tensor | None:
        rows = super()._rows(name, members)
        return rows if rows is None or self._active is None else rows * self._active.to(rows.dtype)

    def append_task(self) -> None:
        """Rows for a new task: affine as the last task left it, statistics at their start."""
        for bank in (self.private_weight, self.private_bias):
            if bank is not None:
                bank.append(bank.table()[-1:])
        for bank, start in ((self.running_mean, 0.0), (self.running_var, 1.0)):
            if bank is not None:
                bank.append(torch.full_like(bank.committed[-1:], start))

    def reset_statistics(self) -> None:
        """Start the statistics of the task in training again."""
        for bank, start in ((self.running_mean, 0.0), (self.running_var, 1.0)):
            if bank is not None and bank.active is not None:
                bank.active.fill_(start)
