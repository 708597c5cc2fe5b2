"""Structured ensembles over tasks: one body whose units are given out, task after task, by importance."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lifelong_ens.convert import BATCH_NORMS, replace_modules
from lifelong_ens.errors import InputError, UnfitNetworkError
from lifelong_ens.layers.exported import log_mean_probability
from lifelong_ens.layers.norm import MemberGroupNorm, MemberLayerNorm
from lifelong_ens.layers.structured import UNIT_LAYERS, StructuredBatchNorm, StructuredLayer, Units
from lifelong_ens.networks.channels import Channels, trace_channels
from lifelong_ens.networks.choosing import member_of_rows
from lifelong_ens.networks.cutting import keep_channels, positions
from lifelong_ens.networks.growing import take_shapes
from lifelong_ens.networks.plain import without_classifier
from lifelong_ens.networks.task import TaskNetwork, by_task

log = logging.getLogger(__name__)

TASK_NORMS = (StructuredBatchNorm, MemberLayerNorm, MemberGroupNorm)


class StructuredNetwork(TaskNetwork):
    """Task t uses the units that were given to tasks 1 to t and trains the rows of its own alone.

    Source: Pomponi, Scardapane and Uncini, Neural Networks 144 (2021), in the continual-learning form of the authors'
    package ``continual-learning`` 0.1.6.5 (SuperMask). A task is learnt in two phases. ``start_scales`` multiplies
    every unit, taken or free, by a learned number; ``choose_units`` gives the task the free units whose numbers
    matter most. Then its rows, norms and head are trained. As in the code, units have their initial weights when they
    are given out, and in a later task frozen units read its new ones too, through columns that were not trained.

    With several members, each has scales of its own and chooses by itself from the same free units; a row that several
    members of the task have chosen is trained by all of them. The paper's ensembles learn one task, and their members
    are trained apart; its lifelong form has one member. Members of a task have norms of their own and share its head.
    Their probabilities are averaged, as everywhere here, where the paper averages logits.

    Where we differ. The units of every linear and convolution layer are given out, on shortcuts and at the ends of
    residual blocks too: a layer left out would be trained by every task. The code zeroes the gradient of frozen
    rows, which weight decay and momentum go on moving; here they are in no optimizer. BatchNorm, which the original
    does not have, has statistics and affine numbers of its own for every task (affine as the last task left it),
    and is off where the layer right before it is; other norms have affine numbers per task. ``grow`` is ours: without
    it a layer whose units are all taken stays as it is.

    Attributes:
        groups: Channels that are widened together; none where the network does not grow.
        sizes: How many channels each group has in each task, ``(tasks, groups)``; None where it does not grow.

    Args:
        body: A network with ``num_features``, or a classifier whose last linear layer is taken off.
        members_per_task: How many members a task holds.
        grow: Units that every task finds free in every layer, as a share of its first ones; it is widened until there
            are as many. Earlier tasks go on computing with the units of their time. 0 for a network of fixed width.

    Raises:
        UnfitNetworkError: The body holds something learned that has no units, such as an embedding; or it is to grow
            and its channels cannot be followed.
    """

    frozen_past = True
    sizes: Tensor | None

    def __init__(self, body: nn.Module, *, members_per_task: int = 1, grow: float = 0.0) -> None:
        super().__init__()
        if members_per_task < 1:
            raise InputError(f"members_per_task is at least 1, not {members_per_task}.")
        if grow < 0:
            raise InputError(f"grow is a share of a layer's units, at least 0, not {grow}.")
        self.members_per_task, self.grow = members_per_task, grow
        self.units = Units(members_per_task)
        body = without_classifier(copy.deepcopy(body))
        self.num_features: int = body.num_features  # pyright: ignore
        self.groups: list[Channels] = trace_channels(body) if grow else []
        self.register_buffer("sizes", torch.zeros(0, len(self.groups), dtype=torch.long) if grow else None)
        self.body = _structured(body, self.units, self.groups)
        self._choosing = False

    @property
    def exhausted(self) -> dict[str, int]:
        """Layers that ran out of units, and the first task, counted from 0, that found none free there."""
        found: dict[str, int] = {}
        for name, layer in self.layers():
            for task in range(layer.num_tasks):
                if not layer.free_units(task).any():
                    found[name] = task
                    break
        return found

    def notes(self) -> list[str]:
        """Which layers ran out of units, and when; which were widened."""
        notes = [f"{name} had no free unit left for task {task + 1}" for name, task in self.exhausted.items()]
        for index, group in enumerate(self.groups):
            widths = [row[index] for row in self.units.widths]
            if widths and widths[-1] > group.size:
                first = next(task for task, width in enumerate(widths) if width > group.size)
                notes.append(
                    f"{group.name} was widened from {group.size} to {widths[-1]} units, first for task {first + 1}"
                )
        return notes

    def layers(self) -> Iterator[tuple[str, StructuredLayer]]:
        """Every layer that has units, with its name in the body."""
        found = self.body.named_modules()
        return ((name, module) for name, module in found if isinstance(module, StructuredLayer))

    def add_task(self, num_classes: int) -> None:
        """Freeze what there is, add a head and rows of norms. The task's units are chosen afterwards."""
        first = not len(self.heads)
        self.heads.requires_grad_(False)
        if self.groups:
            self._widen()
        for _, layer in self.layers():
            layer.masks.append()
        if not first:
            for norm in self._norms():
                _append_task(norm, self.members_per_task)
        features = next((index for index, group in enumerate(self.groups) if group.features), None)
        num_features = self.num_features
        if features is not None:
            # several numbers for each channel where a map was flattened
            num_features = num_features // self.groups[features].size * self.units.widths[-1][features]
        self.heads.add(num_features, num_classes)
        self.train(self.training)

    def start_scales(self) -> dict[str, nn.Parameter]:
        """Freeze everything and scale every unit by ``s ~ N(0, 1)``, for each member.

        Returns:
            The ``s`` by layer, ``(members, units)``, to be trained.
        """
        self.requires_grad_(False)
        self._choosing = True
        return {name: layer.start_scale() for name, layer in self.layers()}

    def choose_units(self, chosen: Mapping[str, Tensor]) -> None:
        """End the phase of the scales: give the newest task these free units and train them, its norms and head.

        Args:
            chosen: For every layer, ``(members, units)`` booleans, as ``choose`` gives them for one member.
        """
        self._choosing = False
        task = len(self.heads) - 1
        for name, layer in self.layers():
            layer.choose(chosen[name])
        for norm in self._norms():
            norm.requires_grad_(True)
            if isinstance(norm, StructuredBatchNorm):
                norm.reset_statistics()
        self.heads[task].requires_grad_(True)
        newly = [name for name, first in self.exhausted.items() if first == task]
        if newly:
            log.warning(
                "task %d finds no free unit in %s: from here on they stay as they are, and only the other layers, "
                "norms and the head learn; grow=0.25 would widen them.",
                task + 1,
                ", ".join(newly),
            )

    def finish_task(self) -> None:
        """Commit the task's rows: from here on nothing moves them."""
        for _, layer in self.layers():
            layer.commit()
        for norm in self._norms():
            for bank in norm.children():
                bank.commit()  # pyright: ignore

    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        """See ``TaskNetwork.forward``; with several members, the logarithm of their mean probability."""
        logits = self.member_logits(x, task)
        return logits[0] if self.members_per_task == 1 else log_mean_probability(logits)

    def member_logits(self, x: Tensor, task: int | Tensor) -> Tensor:
        """Logits of the task's members, ``(members, batch, classes)``; rows of several tasks run task by task."""
        if not isinstance(task, int):
            return by_task(x, task, self.member_logits)
        count = self.members_per_task
        if count == 1:
            return self._run(x, task, task).unsqueeze(0)
        first = task * count
        members = tuple(range(first, first + count))
        if self._choosing:
            members = torch.arange(first, first + count, device=x.device).repeat_interleave(len(x))
        return self._run(x.repeat(count, *[1] * (x.dim() - 1)), task, members).unflatten(0, (count, len(x)))

    def split_logits(self, x: Tensor, task: int) -> Tensor:
        """Logits ``(batch, classes)`` while units are chosen, each row from one member's scales alone.

        The first ``batch // members`` rows are the first member's, as many the next one's, and so on; what is left over
        is the first one's.
        """
        count = self.members_per_task
        members = task if count == 1 else task * count + member_of_rows(len(x), count, x.device)
        return self._run(x, task, members)

    def compiled_parts(self) -> Sequence[nn.Module]:
        """The body."""
        return [self.body]

    def plain_network(self, task: int, member: int) -> nn.Module:
        """See ``TaskNetwork.plain_network``: a smaller dense network, what is off is cut out.

        Rows and columns go of channels that are off in all layers that write them; behind a norm that follows a
        residual sum they stay, where its shift is.

        Raises:
            UnfitNetworkError: The body's channels cannot be followed.
        """
        index = task * self.members_per_task + member
        on = {name: layer.active(index, 1)[0] for name, layer in self.layers()}
        head = copy.deepcopy(self.heads[task])
        with torch.no_grad():
            body: Any = copy.deepcopy(self.body)
            parts = [one for one in body.modules() if isinstance(one, (StructuredLayer, *TASK_NORMS))]
            body = replace_modules(body, {one: one.export(index) for one in parts})
            groups, kept = trace_channels(body), []
            modules: dict[str, Any] = dict(body.named_modules())
            for group in groups:
                keep = torch.stack([on[name] for name in group.writers]).any(dim=0)
                for name, layer in zip(group.norms, group.normalised, strict=True):
                    if layer is None:
                        keep = torch.ones_like(keep)
                    else:
                        _silence(modules[name], ~on[layer])
                kept.append(keep)
                if group.features:
                    columns = positions(keep.nonzero().squeeze(1), head.in_features // group.size)  # pyright: ignore
                    head.weight = nn.Parameter(head.weight[:, columns])  # pyright: ignore
                    head.in_features = len(columns)  # pyright: ignore
            keep_channels(body, groups, kept)
        body.num_features = head.in_features
        return nn.Sequential(body, head)

    def _run(self, x: Tensor, task: int, members: Any) -> Tensor:
        """Logits of rows that belong to members of one task, ``(rows, classes)``."""
        with self.units.of(members):
            return self.heads(self.body(x), task)

    def _widen(self) -> None:
        """Append units where a new task would find too few, and note how many there are."""
        before = self.units.widths[-1] if self.units.widths else [group.size for group in self.groups]
        layers = dict(self.layers())
        more = []
        for group in self.groups:
            masks = [layers[name].masks for name in group.writers]
            free = min(int((~one.used(one.num_tasks - 1)).sum()) for one in masks)
            more.append(max(math.ceil(self.grow * group.size - 1e-9) - free, 0))
        if any(more):
            for layer in layers.values():
                layer.widen(*(0 if group is None else more[group] for group in (layer.writes, layer.reads)))
            for norm in self._norms():
                if isinstance(norm, StructuredBatchNorm) and norm.reads is not None:
                    norm.widen(more[norm.reads])
        self.units.widths.append([size + new for size, new in zip(before, more, strict=True)])
        self.sizes = torch.tensor(self.units.widths, device=next(self.parameters()).device)

    def _norms(self) -> Iterator[nn.Module]:
        return (module for module in self.body.modules() if isinstance(module, TASK_NORMS))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # how wide the network is, is part of the state; that of another body is left to torch to refuse
        sizes = state_dict.get(f"{prefix}sizes")
        base = [group.size for group in self.groups]
        if (
            self.groups
            and sizes is not None
            and len(sizes) == self.num_tasks
            and sizes[:1].tolist() == [base]
        ):
            take_shapes(self, state_dict, prefix)
            self.units.widths = sizes.tolist()
            for _, layer in self.layers():
                layer.masks.num_units = len(layer.layer.weight)
            for norm in self._norms():
                if isinstance(norm, StructuredBatchNorm) and norm.reads is not None:
                    norm.num_features = self.units.widths[-1][norm.reads]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _structured(body: nn.Module, units: Units, groups: Sequence[Channels]) -> nn.Module:
    """The body with structured layers and norms of each task's own, in place."""
    places: dict[str, dict[str, int]] = {}
    for index, group in enumerate(groups):
        for name in group.writers:
            places.setdefault(name, {})["writes"] = index
        for name in (*group.readers, *group.norms):
            places.setdefault(name, {})["reads"] = index
    new: dict[nn.Module, nn.Module] = {}
    for name, module in body.named_modules():
        if module._parameters or module._buffers:
            new[module] = _structured_module(name, module, units, groups, places.get(name, {}))
    if not any(isinstance(module, StructuredLayer) for module in new.values()):
        raise UnfitNetworkError(
            f"{type(body).__name__} has no linear or convolution layer whose units could be given."
        )
    if body in new:
        raise UnfitNetworkError(f"a single {type(body).__name__} is no body; put it into an nn.Sequential.")
    return replace_modules(body, new)


def _structured_module(
    name: str, module: Any, units: Units, groups: Sequence[Channels], place: Mapping[str, int]
) -> nn.Module:
    kind = type(module)
    try:
        if kind in UNIT_LAYERS and "weight" in module._parameters:
            positions = module.weight.shape[1] // groups[place["reads"]].size if "reads" in place else 1
            return StructuredLayer(module, units, **place, positions=positions)
        if isinstance(module, BATCH_NORMS):
            return StructuredBatchNorm(module, units, **place)
        if isinstance(module, nn.LayerNorm):
            return MemberLayerNorm(module, units.members_per_task, units)
        if isinstance(module, nn.GroupNorm):
            return MemberGroupNorm(module, units.members_per_task, units)
    except ValueError as error:
        raise UnfitNetworkError(f"{name}: {error}") from error
    raise UnfitNetworkError(
        f"structured_ensemble gives out units of linear and convolution layers; {name} is a {kind.__name__}, "
        "which every task would change."
    )


def _append_task(norm: nn.Module, members: int) -> None:
    if isinstance(norm, StructuredBatchNorm):
        norm.append_task()
        return
    for bank in norm.children():
        bank.append(bank.table()[-members:])  # pyright: ignore


def _silence(norm: Any, off: Tensor) -> None:
    """Make a norm pass on channels ``(C,)`` that are zero as zeros."""
    for name in ("bias", "running_mean"):
        values = getattr(norm, name)
        if values is not None:
            values.data[off] = 0
