"""Progressive Neural Networks (Rusu et al. 2016, arXiv 1606.04671), on any network of linear and conv layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from torch import Tensor, fx, nn

from lifelong_ens.errors import InputError, UnfitNetworkError
from lifelong_ens.layers.structured import UNIT_LAYERS
from lifelong_ens.networks.plain import without_classifier
from lifelong_ens.networks.task import Columns, TaskNetwork, by_task
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy

Kind = Literal["linear", "adapter"]


def pnn(
    body: nn.Module,
    *,
    laterals: Kind = "linear",
    adapter_width: int | None = None,
    alpha: float = 0.1,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """A new column for every task that also reads the layers of all earlier, frozen columns.

    Args:
        body: The shape of every column; a classifier's last linear layer is taken off.
        laterals: linear connections, or an adapter with one hidden layer for each layer.
        adapter_width: Width of the adapter's hidden layer; that of the layer's own input if not given.
        alpha: Where the adapter's learned scale of each earlier column starts; the paper tries 1, 0.1 and 0.01.
        fit: How each task is trained.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    network = ProgressiveNetwork(body, laterals=laterals, adapter_width=adapter_width, alpha=alpha)
    return Strategy(network=network, fit=fit, seed=seed, device=device, plugins=plugins)


class TaskOf(nn.Module):
    """A network that answers one of its tasks."""

    def __init__(self, network: ProgressiveNetwork, task: int) -> None:
        super().__init__()
        self.network, self.task = network, task

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, C, H, W)`` to logits ``(batch, classes)``."""
        return self.network(x, self.task)


class Activations:
    """What each layer of the columns that have run in this call was given; shared by all columns."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}


class ProgressiveNetwork(TaskNetwork):
    """Column k computes ``h_i = f(W_i h_{i-1} + lateral_i(h_{i-1} of the columns before))``, its head too.

    Source: Rusu et al. 2016, equations 1-2. The first layer has no lateral, as all columns share its input. The paper
    leaves convolutions open: here a lateral has the kernel, stride and padding of its layer, sums before the norm
    and non-linearity, and every convolution has one, those on shortcuts included.

    Args:
        body: The shape of every column.
        laterals: ``linear`` or ``adapter``.
        adapter_width: Width of the adapter's hidden layer.
        alpha: Where the adapter's scales start.
    """

    frozen_past = True

    def __init__(
        self,
        body: nn.Module,
        *,
        laterals: Kind = "linear",
        adapter_width: int | None = None,
        alpha: float = 0.1,
    ) -> None:
        super().__init__()
        if adapter_width is not None and (laterals != "adapter" or adapter_width < 1):
            raise InputError("adapter_width is at least 1 and goes with laterals=adapter.")
        # a template, not a part: kept out of the state
        self.template = [without_classifier(body)]
        self.kind, self.adapter_width, self.alpha = laterals, adapter_width, alpha
        self.activations = Activations()
        self.columns = Columns()
        self.head_laterals = nn.ModuleList()

    def add_task(self, num_classes: int) -> None:
        """Freeze all columns and append one that reads them."""
        earlier = self.num_tasks
        self.requires_grad_(False)
        column = self.columns.add(self.template[0])
        for position, (name, layer) in enumerate(list(_layers(column))):
            lateral = self._lateral(layer, earlier) if earlier and position else None
            parent, _, child = name.rpartition(".")
            setattr(column.get_submodule(parent), child, ReadingLayer(layer, lateral, name, self.activations))
        num_features: int = self.template[0].num_features  # pyright: ignore
        self.heads.add(num_features, num_classes)
        self.head_laterals.append(self._lateral(self.heads[-1], earlier) if earlier else nn.Identity())
        self.train(self.training)

    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        """See ``TaskNetwork.forward``; task k runs columns 0 to k."""
        if isinstance(task, int):
            return self._one(x, task)
        return by_task(x, task, self._one)

    def _one(self, x: Tensor, task: int) -> Tensor:
        self.activations.inputs = {}
        features: list[Tensor] = []
        for column in list(self.columns)[:task]:
            with torch.no_grad():
                features.append(column(x))
        own = self.columns[task](x)
        self.activations.inputs = {}
        logits = self.heads(own, task)
        return logits + self.head_laterals[task](features) if features else logits

    def plain_network(self, task: int, member: int) -> nn.Module:
        """See ``TaskNetwork.plain_network``: the columns up to the task's own with what it reads of them, as a graph.

        Raises:
            UnfitNetworkError: The code of the body cannot be traced.
        """
        network = copy.deepcopy(self).eval()
        try:
            graph = fx.Tracer().trace(TaskOf(network, task))
        except Exception as error:  # fx raises whatever the forward does with a proxy
            raise UnfitNetworkError(
                f"{type(self.template[0]).__name__} cannot be traced, so that a column that reads others has no plain "
                f"form: {error}"
            ) from error
        return fx.GraphModule(TaskOf(network, task), graph)

    def _lateral(self, layer: nn.Module, earlier: int) -> nn.Module:
        if self.kind == "linear":
            return LinearLateral(layer, earlier)
        return AdapterLateral(layer, earlier, self.adapter_width, self.alpha)


def _layers(column: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in column.named_modules() if isinstance(module, UNIT_LAYERS))


class ReadingLayer(nn.Module):
    """A layer of a column, with what it reads from the same layer's inputs in the columns before."""

    def __init__(
        self, layer: nn.Module, lateral: nn.Module | None, name: str, activations: Activations
    ) -> None:
        super().__init__()
        self.layer, self.lateral = layer, lateral
        self.name, self.activations = name, activations

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output plus the lateral's; its input is noted for the columns after."""
        seen = self.activations.inputs.setdefault(self.name, [])
        y = self.layer(x)
        if self.lateral is not None:
            y = y + self.lateral(seen)
        seen.append(x)
        return y


def _like(layer: nn.Module, num_in: int) -> nn.Module:
    """A layer of the same geometry without bias that reads ``num_in`` features or channels."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(num_in, layer.out_features, bias=False)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        options = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return type(layer)(num_in, layer.out_channels, *options, bias=False, padding_mode=layer.padding_mode)  # pyright: ignore
    raise InputError(f"{type(layer).__name__} has no lateral.")


def _width_in(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # pyright: ignore


class LinearLateral(nn.Module):
    """``sum_j U_j h_j`` over the earlier columns j, as one product on their joined inputs (equation 1)."""

    component = "lateral"

    def __init__(self, layer: nn.Module, earlier: int) -> None:
        super().__init__()
        self.axis = -1 if isinstance(layer, nn.Linear) else 1
        self.u = _like(layer, earlier * _width_in(layer))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Inputs of the layer in each earlier column to what is added to its output here."""
        return self.u(torch.cat(inputs, dim=self.axis))


class AdapterLateral(nn.Module):
    """``U relu(V [alpha_j h_j])`` over the joined inputs of the earlier columns j (equation 2).

    V reduces them to the width of the layer's own input (the paper's matrix; its text says the output's), or to
    ``width``; on convolutions it is a 1x1 convolution. There is one learned ``alpha`` for each earlier column.
    """

    component = "lateral"

    def __init__(self, layer: nn.Module, earlier: int, width: int | None, alpha: float) -> None:
        super().__init__()
        own = _width_in(layer)
        hidden = own if width is None else width
        self.axis = -1 if isinstance(layer, nn.Linear) else 1
        self.alpha = nn.Parameter(torch.full((earlier,), alpha))
        if isinstance(layer, nn.Linear):
            self.v: nn.Module = nn.Linear(earlier * own, hidden, bias=False)
        else:
            self.v = type(layer)(earlier * own, hidden, 1, bias=False)  # pyright: ignore
        self.u = _like(layer, hidden)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Inputs of the layer in each earlier column to what is added to its output here."""
        # by index: what traces the network cannot tell how many alphas there are
        scaled = [self.alpha[column] * x for column, x in enumerate(inputs)]
        return self.u(F.relu(self.v(torch.cat(scaled, dim=self.axis))))
