"""A network that is widened task by task: each task uses the units that were there when it ended."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lifelong_ens.convert import replace_modules
from lifelong_ens.errors import UnfitNetworkError
from lifelong_ens.layers.growing import GrowingLayer, GrowingNorm, Stamps
from lifelong_ens.layers.structured import fill_layer
from lifelong_ens.networks.channels import Channels, trace_channels
from lifelong_ens.networks.plain import without_classifier
from lifelong_ens.networks.task import TaskNetwork, by_task


class GrowingNetwork(TaskNetwork):
    """Task t computes with the first units of every layer, as many as there were at its end: its stamp.

    A base for methods, which say how many units a task adds (``grow``), which of them stay (``keep``), and what else
    is trained. New units read all older ones, and older units read new ones too, in the newest task alone:
    an earlier task's slice of the weights is what it was. Every task has a head and batch norms of its own.

    Attributes:
        num_features: Of the body as it was given; a task's own head may read more.
        groups: Channels that grow together, in the order in which they are written; sizes are given in this order.

    Args:
        body: A network with ``num_features``, or a classifier whose last linear layer is taken off.

    Raises:
        UnfitNetworkError: The body holds something through which channels cannot be followed.
    """

    frozen_past = True
    sizes: Tensor

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        plain = without_classifier(copy.deepcopy(body))
        self.num_features: int = plain.num_features  # pyright: ignore
        # a template, not a part: kept out of the state
        self.template = [plain]
        self.groups: list[Channels] = trace_channels(plain)
        self.stamps = Stamps()
        # the stamps as they are stored, (tasks, groups)
        self.register_buffer("sizes", torch.zeros(0, len(self.groups), dtype=torch.long))
        self.body = self._growing(copy.deepcopy(plain))
        features = next((group for group in self.groups if group.features), None)
        self._feature_positions = 1 if features is None else self.num_features // features.size

    def add_task(self, num_classes: int) -> None:
        """Commit and freeze what there is; add norms and a head. The task's units come from ``grow``."""
        self._commit()
        first = not len(self.heads)
        base = [group.size for group in self.groups]
        self._stamp([*self.stamps.table, base if first else self.stamps.table[-1]])
        self.requires_grad_(first)
        for norm in self.norms():
            norm.add()
        self.heads.add(self._num_features(), num_classes)
        self.train(self.training)

    def grow(self, units: Sequence[int]) -> None:
        """Append units to what the newest task has, one count for every group; its head reads them too."""
        for layer in self.layers():
            layer.grow(units[layer.writes], 0 if layer.reads is None else units[layer.reads])
        before = self.stamps.table[-1]
        for norm in self.norms():
            everything = torch.ones(before[norm.reads], dtype=torch.bool)
            norm.resize(everything, units[norm.reads])
        self._stamp(
            [*self.stamps.table[:-1], [size + more for size, more in zip(before, units, strict=True)]]
        )
        self._resize_head(None)

    def keep(self, units: Sequence[Tensor]) -> None:
        """Drop some units that the newest task added: ``(units,)`` booleans for every group, old units all true."""
        for layer in self.layers():
            layer.keep(units[layer.writes], None if layer.reads is None else units[layer.reads])
        for norm in self.norms():
            norm.resize(units[norm.reads], 0)
        self._stamp([*self.stamps.table[:-1], [int(kept.sum()) for kept in units]])
        for group, kept in zip(self.groups, units, strict=True):
            if group.features:
                self._resize_head(kept.repeat_interleave(self._feature_positions))

    def discard(self) -> None:
        """Forget what a task after the first has learnt: its units are gone, its norms and its head start again."""
        before = (
            self.stamps.table[-2] if len(self.stamps.table) > 1 else [group.size for group in self.groups]
        )
        for layer in self.layers():
            layer.discard()
        for norm in self.norms():
            norm.restart()
        self._stamp([*self.stamps.table[:-1], before])
        old: Any = self.heads[-1]
        self.heads[-1] = nn.Linear(self._num_features(), old.out_features).to(old.weight)

    def added(self, task: int) -> list[int]:
        """How many units a task added, for every group; none in the first."""
        now = self.stamps.table[task]
        before = self.stamps.table[task - 1] if task else now
        return [size - old for size, old in zip(now, before, strict=True)]

    def finish_task(self) -> None:
        """Freeze the task's units: from here on its slice of the network stays as it is."""
        self._commit()

    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        """See ``TaskNetwork.forward``; rows of several tasks run task by task."""
        if not isinstance(task, int):
            return by_task(x, task, self.forward)
        with self.stamps.of(task):
            return self.heads(self.body(x), task)

    def compiled_parts(self) -> Sequence[nn.Module]:
        """The body."""
        return [self.body]

    def plain_network(self, task: int, member: int) -> nn.Module:
        """See ``TaskNetwork.plain_network``: a network as wide as the task's own; equal to the bit."""
        body: Any = copy.deepcopy(self.template[0])
        modules, norms = dict(body.named_modules()), {}
        for name, module in self.body.named_modules():
            if isinstance(module, GrowingLayer):
                weight, bias = module.task_tensors(task)
                fill_layer(modules[name], weight, bias)
            elif isinstance(module, GrowingNorm):
                norms[modules[name]] = copy.deepcopy(module[task])
        body = replace_modules(body, norms)
        body.num_features = self.heads[task].in_features
        return nn.Sequential(body, copy.deepcopy(self.heads[task]))

    def layers(self) -> Iterator[GrowingLayer]:
        """The layers that grow, in the order of the body's modules."""
        return (module for module in self.body.modules() if isinstance(module, GrowingLayer))

    def norms(self) -> Iterator[GrowingNorm]:
        """The norms of which every task has its own."""
        return (module for module in self.body.modules() if isinstance(module, GrowingNorm))

    def _stamp(self, table: list[list[int]]) -> None:
        self.stamps.table = table
        self.sizes = torch.tensor(table, dtype=torch.long, device=self.sizes.device)

    def _commit(self) -> None:
        for layer in self.layers():
            if self.stamps.table:
                layer.commit()

    def _growing(self, body: nn.Module) -> nn.Module:
        """The body with layers that grow in the place of plain ones."""
        written = {name: index for index, group in enumerate(self.groups) for name in group.writers}
        read = {name: index for index, group in enumerate(self.groups) for name in group.readers}
        norms = {name: index for index, group in enumerate(self.groups) for name in group.norms}
        for name in read.keys() - written.keys():
            raise UnfitNetworkError(
                f"{name} is added to the network's own input, so that it cannot be widened; "
                "put a layer before the first sum."
            )
        new: dict[nn.Module, nn.Module] = {}
        for name, module in body.named_modules():
            if name in written:
                reads = read.get(name)
                width = 1 if reads is None else self.groups[reads].size
                new[module] = GrowingLayer(module, self.stamps, written[name], reads, width)
            elif name in norms:
                new[module] = GrowingNorm(module, self.stamps, norms[name])
        return replace_modules(body, new)

    def _num_features(self) -> int:
        index = next((i for i, group in enumerate(self.groups) if group.features), None)
        if index is None:
            return self.num_features
        return self.stamps.table[-1][index] * self._feature_positions

    def _resize_head(self, kept: Tensor | None) -> None:
        """The newest head on the present features: some of its columns, all where None, and fresh ones behind."""
        old: Any = self.heads[-1]
        new = nn.Linear(self._num_features(), old.out_features).to(old.weight)
        with torch.no_grad():
            columns = old.weight if kept is None else old.weight[:, kept]
            new.weight[:, : columns.shape[1]] = columns
            new.bias.copy_(old.bias)
        self.heads[-1] = new

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # how wide the network is, is part of the state; that of another body is left to torch to refuse
        stamps = state_dict.get(f"{prefix}sizes")
        base = [group.size for group in self.groups]
        if stamps is not None and len(stamps) == self.num_tasks and stamps[:1].tolist() == [base]:
            take_shapes(self, state_dict, prefix)
            self.stamps.table = stamps.tolist()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def take_shapes(network: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Give every parameter and buffer the shape that it has in a state, so that this can be loaded."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        saved = state_dict.get(prefix + name)
        if saved is not None and saved.dim() == tensor.dim():
            tensor.data = tensor.data.new_empty(saved.shape)
