"""Structured ensembles over tasks: one body whose units are given out, task after task, by importance."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lifelong_ens.errors import InputError
from lifelong_ens.layers.norm import MemberGroupNorm, MemberLayerNorm
from lifelong_ens.layers.structured import UNIT_LAYERS, StructuredBatchNorm, StructuredLayer, Units
from lifelong_ens.networks.plain import Body, without_classifier
from lifelong_ens.networks.task import TaskNetwork, by_task

log = logging.getLogger(__name__)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TASK_NORMS = (StructuredBatchNorm, MemberLayerNorm, MemberGroupNorm)
# what leaves a channel that is zero everywhere zero, and every channel in its place
KEEP_ZEROS = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)


class StructuredNetwork(TaskNetwork):
    """Task t uses the units that were given to tasks 1 to t and trains the rows of its own alone.

    Source: Pomponi, Scardapane and Uncini, Neural Networks 144 (2021), in the continual-learning form of the authors'
    package ``continual-learning`` 0.1.6.5 (SuperMask). A task is learnt in two phases. ``start_scales`` multiplies
    every unit, taken or free, by a learned number; ``choose_units`` gives the task the free units whose numbers
    matter most. Then its rows, norms and head are trained. As in the code, units have their initial weights when they
    are given out, and in a later task frozen units read its new ones too, through columns that were not trained.

    Where we differ. The units of every linear and convolution layer are given out, on shortcuts and at the ends of
    residual blocks too: a layer left out would be trained by every task. The code zeroes the gradient of frozen
    rows, which weight decay and momentum go on moving; here they are in no optimizer. BatchNorm, which the original
    does not have, has statistics and affine numbers of its own for every task (affine as the last task left it),
    and is off where the layer right before it is; other norms have affine numbers per task.

    Args:
        body: A network with ``num_features``, or a classifier whose last linear layer is taken off.

    Raises:
        InputError: The body holds something learned that has no units, such as an embedding.
    """

    frozen_past = True

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.units = Units()
        body = without_classifier(copy.deepcopy(body))
        self.num_features: int = body.num_features  # pyright: ignore
        self.body = _structured(body, self.units)

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
        """Which layers ran out of units, and when."""
        return [f"{name} had no free unit left for task {task + 1}" for name, task in self.exhausted.items()]

    def layers(self) -> Iterator[tuple[str, StructuredLayer]]:
        """Every layer that has units, with its name in the body."""
        found = self.body.named_modules()
        return ((name, module) for name, module in found if isinstance(module, StructuredLayer))

    def add_task(self, num_classes: int) -> None:
        """Freeze what there is, add a head and rows of norms. The task's units are chosen afterwards."""
        first = not len(self.heads)
        self.heads.requires_grad_(False)
        for _, layer in self.layers():
            layer.masks.append()
        if not first:
            for norm in self._norms():
                _append_task(norm)
        self.heads.add(self.num_features, num_classes)
        self.train(self.training)

    def start_scales(self) -> dict[str, nn.Parameter]:
        """Freeze everything and scale every unit by ``s ~ N(0, 1)``; returns the ``s`` by layer, to be trained."""
        self.requires_grad_(False)
        return {name: layer.start_scale() for name, layer in self.layers()}

    def choose_units(self, chosen: Mapping[str, Tensor]) -> None:
        """End the phase of the scales: give the newest task these free units and train them, its norms and head.

        Args:
            chosen: For every layer, ``(units,)`` booleans, as ``choose`` gives them.
        """
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
                "task %d finds no free unit in %s: from here on they stay as they are, and only the other "
                "layers, norms and the head learn.",
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
        """See ``TaskNetwork.forward``; rows of several tasks run task by task."""
        if isinstance(task, int):
            return self._one(x, task)
        return by_task(x, task, self._one)

    def export_task(self, task: int) -> nn.Module:
        """One task as a smaller dense network: rows and columns of units that are off are cut out; equal to 1e-5.

        Raises:
            InputError: The body is not a chain of layers, or a layer of it would not leave a zero zero.
        """
        with torch.no_grad():
            layers, kept, width = _cut(self.body, task)
            kept = _positions(kept, self.num_features // width)
            head = nn.Linear(len(kept), self.heads[task].out_features)  # pyright: ignore
            head.weight.copy_(self.heads[task].weight[:, kept])  # pyright: ignore
            head.bias.copy_(self.heads[task].bias)  # pyright: ignore
        return nn.Sequential(*layers, head.to(self.heads[task].weight)).eval()  # pyright: ignore

    def _one(self, x: Tensor, task: int) -> Tensor:
        with self.units.of(task):
            return self.heads(self.body(x), task)

    def _norms(self) -> Iterator[nn.Module]:
        return (module for module in self.body.modules() if isinstance(module, TASK_NORMS))


def choose(
    importance: Mapping[str, Tensor],
    free: Mapping[str, Tensor],
    quantile: float,
    *,
    scope: str = "local",
    pruning: str = "hard",
) -> dict[str, Tensor]:
    """Free units whose importance reaches the quantile of those it is compared with.

    ``hard`` compares a unit with the free ones, ``soft`` with all; ``local`` within its layer, ``global`` over all
    layers (the code divides by the sum of all importances before, which changes no order). Units of equal importance
    stand in the order of their index, where a threshold would take all of them: dead units all have importance 0.
    While a layer has free units it gives at least its most important one.

    Args:
        importance: By layer, ``(units,)``.
        free: By layer, ``(units,)`` booleans.
        quantile: Share of what is compared that is left out, in [0, 1).
        scope: ``local`` or ``global``.
        pruning: ``hard`` or ``soft``.

    Returns:
        By layer, ``(units,)`` booleans, all of them free units.
    """
    groups = [[name] for name in importance] if scope == "local" else [list(importance)]
    chosen: dict[str, Tensor] = {}
    for names in groups:
        score = torch.cat([importance[name] for name in names])
        is_free = torch.cat([free[name] for name in names])
        compared = is_free if pruning == "hard" else torch.ones_like(is_free)
        # ranks from 0 among what is compared; the others stand before them
        order = torch.where(compared, score, -torch.inf).argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - int((~compared).sum())
        reaches = is_free & (rank >= quantile * (int(compared.sum()) - 1) - 1e-9)
        parts = reaches.split([len(importance[name]) for name in names])
        chosen.update(zip(names, parts, strict=True))
    for name, units in chosen.items():
        if free[name].any() and not units.any():
            best = torch.where(free[name], importance[name], -torch.inf).argmax()
            chosen[name] = units.index_fill(0, best, True)
    return chosen


def _structured(body: nn.Module, units: Units) -> nn.Module:
    """The body with structured layers and norms of each task's own, in place."""
    new: dict[nn.Module, nn.Module] = {}
    for name, module in body.named_modules():
        if module._parameters or module._buffers:
            new[module] = _structured_module(name, module, units)
    if not any(isinstance(module, StructuredLayer) for module in new.values()):
        raise InputError(
            f"{type(body).__name__} has no linear or convolution layer whose units could be given."
        )
    if body in new:
        raise InputError(f"a single {type(body).__name__} is no body; put it into an nn.Sequential.")
    for parent in list(body.modules()):
        # not named_children, which leaves out the second name of a module that stands in two places
        for child, module in list(parent._modules.items()):
            if module in new:
                setattr(parent, child, new[module])
    return body


def _structured_module(name: str, module: nn.Module, units: Units) -> nn.Module:
    kind = type(module)
    try:
        if kind in UNIT_LAYERS and "weight" in module._parameters:
            return StructuredLayer(module, units)
        if isinstance(module, BATCH_NORMS):
            return StructuredBatchNorm(module, units)
        if isinstance(module, nn.LayerNorm):
            return MemberLayerNorm(module, 1, units)
        if isinstance(module, nn.GroupNorm):
            return MemberGroupNorm(module, 1, units)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    raise InputError(
        f"structured_ensemble gives out units of linear and convolution layers; {name} is a {kind.__name__}, "
        "which every task would change."
    )


def _append_task(norm: nn.Module) -> None:
    if isinstance(norm, StructuredBatchNorm):
        norm.append_task()
        return
    for bank in norm.children():
        bank.append(bank.table()[-1:])  # pyright: ignore


def _cut(body: nn.Module, task: int) -> tuple[list[nn.Module], Tensor, int]:
    """The layers of a chain with one task's units alone, which units of the last are left, and of how many."""
    layers: list[nn.Module] = []
    kept: Tensor | None = None
    width, after_layer = 0, False
    for name, module in _chain(body, ""):
        if isinstance(module, StructuredLayer):
            layer, kept = _cut_layer(name, module, task, kept, width)
            width = module.masks.num_units
            layers.append(layer)
        elif isinstance(module, StructuredBatchNorm) and after_layer and kept is not None:
            layers.append(_cut_norm(module, task, kept))
        elif isinstance(module, KEEP_ZEROS):
            layers.append(copy.deepcopy(module))
        else:
            raise InputError(
                f"export_task cuts chains of linear and convolution layers, norms right after them, ReLU and "
                f"pooling; {name} is a {type(module).__name__}."
            )
        after_layer = isinstance(module, StructuredLayer)
    if kept is None:
        raise InputError("export_task: the body has no layer to cut.")
    return layers, kept, width


def _chain(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested sequences in the order in which they run."""
    if isinstance(module, nn.Sequential | Body):
        for child, part in module.named_children():
            yield from _chain(part, f"{name}.{child}".lstrip("."))
    else:
        yield name, module


def _cut_layer(
    name: str, structured: StructuredLayer, task: int, kept: Tensor | None, width: int
) -> tuple[nn.Module, Tensor]:
    """A layer with the task's rows, and the columns of the ``kept`` of ``width`` units before it (None: all)."""
    layer, active = structured.layer, structured.masks.row(task)
    weight, bias = structured.masked(task, active)
    rows = active.nonzero().squeeze(1)
    if getattr(layer, "groups", 1) != 1:
        raise InputError(f"export_task: {name} is a grouped convolution, whose columns cannot be cut.")
    weight = weight[rows]
    if kept is not None:
        # flattened channels are followed by all their positions
        weight = weight[:, _positions(kept, weight.shape[1] // width)]
    cut = copy.copy(layer)
    cut._parameters = dict(layer._parameters)
    cut.weight = nn.Parameter(weight.detach().clone())
    cut.bias = None if bias is None else nn.Parameter(bias[rows].detach().clone())
    sizes = (
        ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", "in_channels")
    )
    for size, length in zip(sizes, weight.shape[:2], strict=True):
        setattr(cut, size, length)
    return cut, rows


def _cut_norm(structured: StructuredBatchNorm, task: int, kept: Tensor) -> nn.Module:
    """The task's norm as torch's own, with the ``kept`` channels alone."""
    norm: Any = structured.export(task)
    norm.num_features = len(kept)
    for name in ("weight", "bias"):
        if getattr(norm, name) is not None:
            setattr(norm, name, nn.Parameter(getattr(norm, name).detach()[kept]))
    for name in ("running_mean", "running_var"):
        if getattr(norm, name) is not None:
            setattr(norm, name, getattr(norm, name)[kept])
    return norm


def _positions(channels: Tensor, per_channel: int) -> Tensor:
    """Indices of the given channels in a flattened ``(channels, positions)``."""
    offsets = torch.arange(per_channel, device=channels.device)
    return (channels.unsqueeze(1) * per_channel + offsets).flatten()
