"""Dynamically expandable networks: units are retrained, added, and split where they would drift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lifelong_ens.layers.growing import GrowingLayer
from lifelong_ens.networks.growing import GrowingNetwork

# weight and bias of a layer
Tensors = tuple[Tensor, Tensor | None]


class DenNetwork(GrowingNetwork):
    """What is done to units in a task of DEN; when, and how they are trained, is up to the strategy.

    Source: Yoon, Yang, Lee and Hwang, "Lifelong Learning with Dynamically Expandable Networks", ICLR 2018. A unit is
    a row of a linear layer or a filter; where several layers write the same channel of a residual stream, their
    rows together. Its incoming weights include its bias.

    Weights that earlier tasks left may be retrained, so outputs of earlier tasks may change. Their norms and heads
    are their own and stay.

    Attributes:
        history: Units of every group that each task selected and split, ``(tasks, groups, 2)``.

    Args:
        body: A network with ``num_features``, or a classifier whose last linear layer is taken off.
    """

    frozen_past = False
    history: Tensor

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.register_buffer("history", torch.zeros(0, len(self.groups), 2, dtype=torch.long))

    @property
    def head(self) -> Any:
        """The newest task's."""
        return self.heads[-1]

    def add_task(self, num_classes: int) -> None:
        """Freeze what there is, add norms and a head; after the first task the head starts at zero.

        The head alone is a convex problem, whose solution is the same from any start; from zero the weights that l1
        leaves out are out at once.
        """
        super().add_task(num_classes)
        self.history = torch.cat([self.history, self.history.new_zeros(1, len(self.groups), 2)])
        if self.num_tasks:
            for parameter in self.head.parameters():
                nn.init.zeros_(parameter)

    def notes(self) -> list[str]:
        """What every task after the first selected, added and split."""
        lines = []
        for task in range(1, self.num_tasks):
            rows = zip(
                self.groups, self.stamps.table[task - 1], self.history[task], self.added(task), strict=True
            )
            parts = [
                f"{group.name} selected {selected} of {size}, added {added - split}, split {split}"
                for group, size, (selected, split), added in (
                    (group, size, pair.tolist(), added) for group, size, pair, added in rows
                )
            ]
            lines.append(f"task {task + 1}: " + "; ".join(parts))
        return lines

    def old_tensors(self) -> list[Tensors]:
        """Copies of what the layers had when the newest task began and may have changed since, layer by layer."""
        found = []
        for layer in self.layers():
            bias = layer.layer.bias
            found.append(
                (layer.layer.weight.detach().clone(), None if bias is None else bias.detach().clone())
            )
        return found

    def filters(self) -> list[bool]:
        """Whether the units of every group are filters, not units of linear layers."""
        found = [False] * len(self.groups)
        for layer in self.layers():
            found[layer.writes] = layer.layer.weight.dim() > 2
        return found

    def train_old(self, trained: bool) -> None:
        """Let the weights of earlier tasks be trained, or freeze them."""
        for layer in self.layers():
            layer.layer.requires_grad_(trained)

    @torch.no_grad()
    def select(self) -> list[Tensor]:
        """Units from which the newest head can be reached through weights that are not zero, and note how many.

        Breadth first from every output of the head (the code starts at the first output alone), backwards through
        all layers, around residual blocks until nothing more is found.

        Returns:
            ``(units,)`` booleans for every group.
        """
        device = self.head.weight.device
        selected = [torch.zeros(size, dtype=torch.bool, device=device) for size in self.stamps.table[-1]]
        for index, group in enumerate(self.groups):
            if group.features:
                used = (self.head.weight != 0).any(dim=0)
                selected[index] = used.view(-1, self._feature_positions).any(dim=1)
        edges = [(layer.writes, layer.reads, _edges(layer)) for layer in self.layers()]
        found = True
        while found:
            found = False
            for writes, reads, edge in reversed(edges):
                if reads is not None:
                    reached = selected[reads] | edge[selected[writes]].any(dim=0)
                    found = found or not torch.equal(reached, selected[reads])
                    selected[reads] = reached
        self.history[-1, :, 0] = torch.stack([units.sum() for units in selected])
        return selected

    def sub_network(self, units: Sequence[Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """The old weights and biases, each with a mask, in its shape, of those between the given old units."""
        found: list[tuple[nn.Parameter, Tensor]] = []
        for layer in self.layers():
            weight, bias, rows = layer.layer.weight, layer.layer.bias, units[layer.writes]
            mask = rows.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
            if layer.reads is not None:
                columns = units[layer.reads].repeat_interleave(layer.positions)
                mask = mask & columns.view(1, -1, *[1] * (weight.dim() - 2))
            found.append((weight, mask))
            if bias is not None:
                found.append((bias, rows))
        return found

    def head_columns(self, units: Sequence[Tensor]) -> Tensor:
        """Which of the newest head's weights read the given units, in their shape."""
        features = next(chosen for group, chosen in zip(self.groups, units, strict=True) if group.features)
        return features.repeat_interleave(self._feature_positions).expand_as(self.head.weight)

    def new_units(self) -> list[list[Tensor]]:
        """For every group what makes up the units that the newest task added, tensors ``(new units, ...)``.

        Rows of all layers that write them, biases, and shifts of norms: where all of these are zero, the unit's
        channel is.
        """
        parts: list[list[Tensor]] = [[] for _ in self.groups]
        for layer in self.layers():
            parts[layer.writes] += [new for new in (layer.new_rows, layer.new_bias) if new is not None]
        for norm in self.norms():
            shift: Any = norm[-1].bias
            if shift is not None:
                parts[norm.reads].append(shift[self.stamps.table[-2][norm.reads] :])
        return [[part for part in group if len(part)] for group in parts]

    @torch.no_grad()
    def drop_zero_units(self) -> None:
        """Drop those of the newest task's units whose channel is zero for any input; its outputs stay as they are."""
        kept = []
        sizes = zip(self.stamps.table[-2], self.stamps.table[-1], self.new_units(), strict=True)
        for before, now, parts in sizes:
            units = torch.ones(now, dtype=torch.bool, device=self.sizes.device)
            if parts:
                units[before:] = torch.stack([part.reshape(len(part), -1).any(dim=1) for part in parts]).any(
                    dim=0
                )
            kept.append(units)
        self.keep(kept)

    @torch.no_grad()
    def drift(self, before: Sequence[Tensors]) -> list[Tensor]:
        """``||w_i^t - w_i^(t-1)||_2`` of the incoming weights of every old unit, ``(old units,)`` for every group."""
        squares = [torch.zeros(size, device=self.sizes.device) for size in self.stamps.table[-2]]
        for layer, (weight, bias) in zip(self.layers(), before, strict=True):
            moved = (layer.layer.weight - weight).flatten(1).square().sum(dim=1)
            squares[layer.writes] += moved
            if bias is not None:
                squares[layer.writes] += (layer.layer.bias - bias).square()
        return [square.sqrt() for square in squares]

    @torch.no_grad()
    def split(self, before: Sequence[Tensors], units: Sequence[Tensor]) -> None:
        """Give old units back what they were, and the newest task copies of what they have become.

        An old unit gets its incoming weights of the task before, and its outgoing ones into old units; it reads none
        of the new units. Its copy is appended with its present incoming weights. What units read of the
        pair sums to what they read of the unit now: units and outputs of the newest task read the copy alone, old
        units that are not split read as before and the difference of the copy. So the newest task's outputs
        change no more than the old unit's. The paper leaves these edges open; in the released code both keep the
        full weight, and the copy's bias is random.

        Args:
            before: ``old_tensors`` when the task began.
            units: Indices of old units, ``(split units,)`` for every group.
        """
        now = [layer.task_tensors(self.stamps.newest) for layer in self.layers()]
        head, norms = self.head, [norm[-1] for norm in self.norms()]
        self.grow([len(chosen) for chosen in units])
        for layer, old, present in zip(self.layers(), before, now, strict=True):
            layer.assign(*_split_layer(layer, old, present, units))
        for norm, old in zip(self.norms(), norms, strict=True):
            _append_copies(norm[-1], old, units[norm.reads])
        for group, chosen in zip(self.groups, units, strict=True):
            if group.features:
                columns = _positions(chosen, self._feature_positions)
                self.head.weight[:, head.in_features :] = head.weight[:, columns]
                self.head.weight[:, columns] = 0
        self.history[-1, :, 1] = torch.tensor([len(chosen) for chosen in units])


def _edges(layer: GrowingLayer) -> Tensor:
    """Where a unit reads a unit with a weight that is not zero, ``(rows, units read)`` booleans."""
    weight = layer.layer.weight
    return (weight != 0).reshape(len(weight), weight.shape[1] // layer.positions, -1).any(dim=2)


def _positions(channels: Tensor, per_channel: int) -> Tensor:
    """Indices of the given channels in a flattened ``(channels, positions)``."""
    offsets = torch.arange(per_channel, device=channels.device)
    return (channels.unsqueeze(1) * per_channel + offsets).flatten()


def _split_layer(layer: GrowingLayer, old: Tensors, now: Tensors, units: Sequence[Tensor]) -> Tensors:
    """The newest task's tensors with the copies of split units; see ``DenNetwork.split``."""
    (old_weight, old_bias), (weight, bias) = old, now
    rows, columns = old_weight.shape[:2]
    split = units[layer.writes]
    weight = torch.cat([weight, weight[split]])
    if layer.reads is not None:
        read = _positions(units[layer.reads], layer.positions)
        present = weight[:, read]
        weight[:, read] = 0
        weight[:rows, read] = old_weight[:, read]
        weight = torch.cat([weight, present - weight[:, read]], dim=1)
    weight[split] = 0
    weight[split, :columns] = old_weight[split]
    if bias is not None and old_bias is not None:
        bias = torch.cat([bias, bias[split]])
        bias[split] = old_bias[split]
    return weight, bias


def _append_copies(norm: Any, before: Any, units: Tensor) -> None:
    """Give the last channels of a norm the numbers that the copied ones had before it was widened."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        values = getattr(before, name)
        if values is not None and len(units):
            getattr(norm, name)[-len(units) :] = values[units]
