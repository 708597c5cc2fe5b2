"""Layers whose output units belong to tasks: each task switches on those of the tasks up to it.

Source: the continual-learning form of Structured Ensembles (Pomponi, Scardapane and Uncini, Neural Networks 144,
2021; the authors' package ``continual-learning`` 0.1.6.5, module SuperMask).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.layers.bank import Bank, Members, Selection, along, per_row
from lifelong_ens.layers.bits import pack, unpack
from lifelong_ens.layers.norm import MemberBatchNorm

UNIT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Units(Selection):
    """The selection of a structured network: the members of one task; and what the last layer switched off.

    Member m of task t has the number ``t * members_per_task + m``. While units are being chosen, the members are an id
    for each row of the batch. A norm that is given the very tensor that a layer returned switches off the same units
    as that layer.

    Attributes:
        widths: For each task, how many channels each group has; empty where the network is never widened.

    Args:
        members_per_task: How many members a task has.
    """

    def __init__(self, members_per_task: int = 1) -> None:
        super().__init__()
        self.members_per_task = members_per_task
        self.widths: list[list[int]] = []
        self._output: Tensor | None = None
        self._active: Tensor | None = None

    @property
    def blocks(self) -> tuple[int, ...]:
        """The members of one task whose blocks of rows make up the batch."""
        if isinstance(self.members, int):
            return (self.members,)
        if not isinstance(self.members, tuple):
            raise ValueError("a structured layer runs one task at a time; select its members with `of`.")
        return self.members

    @property
    def task(self) -> int:
        """The task that all rows belong to."""
        return self.blocks[0] // self.members_per_task

    def width(self, group: int | None, task: int) -> int | None:
        """How many channels a group has in a task; None where it is always the same."""
        return None if group is None or task >= len(self.widths) else self.widths[task][group]

    @contextmanager
    def of(self, members: Members) -> Iterator[None]:
        """Select members inside a with-block; see ``Selection.of``."""
        with super().of(members):
            try:
                yield
            finally:
                # it would keep the graph of the last layer alive
                self._output = self._active = None

    def note(self, output: Tensor, active: Tensor | None) -> None:
        """A layer returned ``output`` with only the units ``active``, ``(members, units)``; None for all."""
        self._output, self._active = output, active

    def active_in(self, x: Tensor) -> Tensor | None:
        """Which channels of ``x`` are on, ``(members, channels)``; None where all are or where that is not known."""
        return self._active if x is self._output else None


class Masks(nn.Module):
    """Packed bits: a row for every member of every task, the units that are on in it, ``ceil(units / 8)`` bytes."""

    component = "mask"
    bits: Tensor

    def __init__(self, num_units: int, members_per_task: int = 1) -> None:
        super().__init__()
        self.num_units, self.members_per_task = num_units, members_per_task
        self.register_buffer("bits", torch.zeros(0, -(-num_units // 8), dtype=torch.uint8))

    def extra_repr(self) -> str:
        """The part of ``repr`` between the brackets."""
        return f"{len(self.bits)} x {self.num_units} bits"

    @property
    def num_tasks(self) -> int:
        """How many tasks have masks."""
        return len(self.bits) // self.members_per_task

    def rows(self, first: int, count: int) -> Tensor:
        """Units that are on in ``count`` members from ``first``, ``(count, units)`` booleans."""
        return unpack(self.bits[first : first + count], self.num_units)

    def used(self, task: int) -> Tensor:
        """Units that any member of a task has on, ``(units,)`` booleans; none before the first."""
        if task < 0:
            return torch.zeros(self.num_units, dtype=torch.bool, device=self.bits.device)
        return self.rows(task * self.members_per_task, self.members_per_task).any(dim=0)

    def append(self) -> None:
        """A task more, whose members all have the units of the task before."""
        row = pack(self.used(self.num_tasks - 1))
        self.bits = torch.cat([self.bits, row.expand(self.members_per_task, -1)])

    def switch_on(self, units: Tensor) -> None:
        """Give the newest task's members these units too, ``(members, units)`` booleans."""
        members = self.members_per_task
        self.bits[-members:] = pack(self.rows(len(self.bits) - members, members) | units)

    def widen(self, units: int) -> None:
        """Append units that are off everywhere."""
        self.num_units += units
        self.bits = F.pad(self.bits, (0, -(-self.num_units // 8) - self.bits.shape[1]))


class StructuredLayer(nn.Module):
    """A linear or convolution layer whose rows (output units) belong to the task that first switched them on.

    The layer's own tensors are never trained. The rows of the task in training are leaves of their own, committed
    when it ends: whatever the optimizer does, momentum and weight decay included, reaches no other row. A task
    computes with the rows and columns that were there when it was learnt.

    Attributes:
        masks: Which units are on in each member of each task, earlier tasks' included.
        scale: While units are being chosen, ``s`` of the newest task's members, ``(members, units)``; otherwise None.
        new_weight: Rows in training, ``(k, in, ...)``, or None.
        new_bias: Their biases, ``(k,)``, or None.

    Args:
        layer: A linear or convolution layer; its initial weights are where every unit starts.
        units: The network's selection.
        writes: Index of the group of channels that it writes; None where its rows stay as many as they are.
        reads: Index of the group that it reads; None where its columns stay as many as they are.
        positions: How many numbers it reads of each channel: more than one after a flattened map.
    """

    scale: nn.Parameter | None
    new_weight: nn.Parameter | None
    new_bias: nn.Parameter | None
    new_units: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        units: Units,
        writes: int | None = None,
        reads: int | None = None,
        positions: int = 1,
    ) -> None:
        super().__init__()
        self.layer: Any = layer.requires_grad_(False)
        self.units = units
        self.writes, self.reads, self.positions = writes, reads, positions
        self.masks = Masks(len(self.layer.weight), units.members_per_task)
        for name in ("scale", "new_weight", "new_bias"):
            self.register_parameter(name, None)
        self.register_buffer("new_units", None, persistent=False)

    @property
    def num_tasks(self) -> int:
        """How many tasks have a mask."""
        return self.masks.num_tasks

    def free_units(self, task: int) -> Tensor:
        """Units that were there for a task and that none before it uses, ``(units,)`` booleans."""
        return ~self.masks.used(task - 1)[: self.units.width(self.writes, task)]

    def start_scale(self) -> nn.Parameter:
        """Scale every unit by a fresh ``s ~ N(0, 1)`` until units are chosen; returns ``s``, ``(members, units)``."""
        shape = (self.units.members_per_task, self.masks.num_units)
        self.scale = nn.Parameter(torch.randn(shape).to(self.layer.weight))
        return self.scale

    def choose(self, units: Tensor) -> None:
        """Give the newest task's members free units, ``(members, units)`` booleans, and train their rows alone.

        A unit that several members of the task have been given is one row that they train together.
        """
        self.scale = None
        self.masks.switch_on(units)
        self.new_units = units.any(dim=0).nonzero().squeeze(1)
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

    def widen(self, rows: int, channels: int) -> None:
        """Append rows and columns, for ``channels`` more that it reads, drawn as torch's layers draw theirs."""
        weight, bias = self.layer.weight, self.layer.bias
        columns = channels * self.positions
        bound = ((weight.shape[1] + columns) * weight[0, 0].numel()) ** -0.5
        with torch.no_grad():
            beside = weight.new_empty(len(weight), columns, *weight.shape[2:]).uniform_(-bound, bound)
            weight = torch.cat([weight, beside], dim=1)
            weight = torch.cat([weight, weight.new_empty(rows, *weight.shape[1:]).uniform_(-bound, bound)])
            if bias is not None:
                bias = torch.cat([bias, bias.new_empty(rows).uniform_(-bound, bound)])
        fill_layer(self.layer, weight, bias)
        self.layer.requires_grad_(False)
        self.masks.widen(rows)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the members' units alone; while units are chosen, with all of them scaled."""
        if self.scale is not None:
            y = run_layer(self.layer, x, self.layer.weight, self.layer.bias)
            ids = self.units.members
            members = self.units.members_per_task
            scale = self.scale[ids % members] if isinstance(ids, Tensor) else self.scale
            y = y * along(scale, y, self._unit_axis(y))
            self.units.note(y, None)
            return y
        blocks = self.units.blocks
        active = self.active(blocks[0], len(blocks))
        y = run_layer(self.layer, x, *self.masked(self.units.task, active.any(dim=0)))
        if len(blocks) > 1:
            y = y * along(per_row(active, len(y), self), y, self._unit_axis(y))
        self.units.note(y, active)
        return y

    def active(self, first: int, count: int) -> Tensor:
        """Units that are on in ``count`` members of one task, ``(count, units)`` booleans."""
        width = self.units.width(self.writes, first // self.units.members_per_task)
        return self.masks.rows(first, count)[:, :width]

    def masked(self, task: int, active: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a task, as wide as it was when it was learnt, zero at units that are off."""
        in_training = task == self.num_tasks - 1
        channels = self.units.width(self.reads, task)
        columns = None if channels is None else channels * self.positions
        off, parts = ~active, []
        for name, new in (("weight", self.new_weight), ("bias", self.new_bias)):
            part = getattr(self.layer, name)
            if part is not None:
                part = part[: len(off), :columns] if name == "weight" else part[: len(off)]
                part = part.masked_fill(off.view(-1, *[1] * (part.dim() - 1)), 0)
                if in_training and new is not None and self.new_units is not None:
                    part = part.index_copy(0, self.new_units, new)
            parts.append(part)
        return parts[0], parts[1]

    def export(self, member: int) -> nn.Module:
        """The plain layer of one member, as wide as its task, zero at units that are off."""
        plain = copy.copy(self.layer)
        plain._parameters = dict(self.layer._parameters)
        active = self.active(member, 1)[0]
        fill_layer(plain, *self.masked(member // self.units.members_per_task, active))
        return plain

    def _unit_axis(self, y: Tensor) -> int:
        return y.dim() - 1 if isinstance(self.layer, nn.Linear) else 1


def run_layer(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer on ``x`` with other tensors in place of its own."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def fill_layer(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Put other tensors, of other widths, into a plain linear or convolution layer."""
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    names = (
        ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", "in_channels")
    )
    for name, length in zip(names, weight.shape[:2], strict=True):
        setattr(layer, name, length)


class StructuredBatchNorm(MemberBatchNorm):
    """Batch normalisation with affine rows and statistics for each member, off where the layer before it is.

    Without that, a unit that is off would leave the norm as its shift: no longer zero, and not to be cut out.

    Args:
        norm: The plain norm whose numbers the first task starts from.
        units: The network's selection.
        reads: Index of the group of channels that it normalises; None where they stay as many as they are.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, units: Units, reads: int | None = None) -> None:
        super().__init__(norm, units.members_per_task, units, private_affine=True)
        self.units, self.reads = units, reads

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, C, ...)`` in and out; while units are chosen, members that share a batch share its statistics."""
        if isinstance(self.units.members, Tensor):
            return self._alone(x, self._num_members() - self.units.members_per_task, None)
        active, blocks = self.units.active_in(x), self.units.blocks
        parts = [
            self._alone(part, member, None if active is None else active[block])
            for block, (member, part) in enumerate(zip(blocks, x.chunk(len(blocks)), strict=True))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _alone(self, x: Tensor, member: int, active: Tensor | None) -> Tensor:
        """Rows of one member, with the channels ``active``, ``(C,)`` booleans, alone; None for all."""
        banks = (self.running_mean, self.running_var, self.private_weight, self.private_bias)
        # a member has the channels that were there when its task was learnt
        rows = [None if bank is None else bank.row(member)[: x.shape[1]] for bank in banks]
        mean, var, weight, bias = rows
        if active is not None and weight is not None and bias is not None:
            weight, bias = weight * active.to(weight.dtype), bias * active.to(bias.dtype)
        learning = self.running_mean is None or (self.training and member >= self.running_mean.num_committed)
        y = F.batch_norm(x, mean, var, weight, bias, learning, self.momentum, self.eps)
        if active is not None and weight is None:
            y = y * active.to(y.dtype).view(1, -1, *[1] * (y.dim() - 2))
        return y

    def append_task(self) -> None:
        """Rows for a new task's members: affine as the last task's left theirs, statistics at their start."""
        members = self.units.members_per_task
        for bank in (self.private_weight, self.private_bias):
            if bank is not None:
                bank.append(bank.table()[-members:])
        for bank, start in self._statistics():
            bank.append(torch.full_like(bank.committed[-members:], start))

    def reset_statistics(self) -> None:
        """Start the statistics of the task in training again."""
        for bank, start in self._statistics():
            if bank.active is not None:
                bank.active.fill_(start)

    def widen(self, channels: int) -> None:
        """Append channels that earlier tasks do not have; they start as those of a fresh norm."""
        self.num_features += channels
        affine = ((self.private_weight, 1.0), (self.private_bias, 0.0))
        for bank, start in (*affine, *self._statistics()):
            if bank is not None:
                bank.committed = F.pad(bank.committed, (0, channels), value=start)

    def export(self, member: int) -> nn.Module:
        """One member as torch's plain norm, as wide as its task."""
        plain: Any = super().export(member)
        width = self.units.width(self.reads, member // self.units.members_per_task)
        if width is not None:
            plain.num_features = width
            for name in ("weight", "bias", "running_mean", "running_var"):
                values = getattr(plain, name)
                if values is not None:
                    values.data = values.data[:width].clone()
        return plain

    def _statistics(self) -> Iterator[tuple[Bank, float]]:
        """The banks of running statistics and where they start."""
        for bank, start in ((self.running_mean, 0.0), (self.running_var, 1.0)):
            if bank is not None:
                yield bank, start
