"""Which layers write and read the same channels: what has to change together when a network is widened or cut."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lifelong_ens.convert import BATCH_NORMS
from lifelong_ens.errors import UnfitNetworkError
from lifelong_ens.layers.structured import UNIT_LAYERS

# what treats every channel alike, leaves a zero channel zero and every channel in its place
CHANNELWISE = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
# what gives back what it gets, in evaluation
PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d)
CHANNELWISE_FUNCTIONS = {
    torch.relu, F.relu, F.leaky_relu, F.elu, F.gelu, F.silu, torch.tanh, F.dropout, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
}  # fmt: skip
CHANNELWISE_METHODS = {"relu", "relu_", "tanh", "contiguous"}
ADDITIONS = {operator.add, operator.iadd, torch.add}


@dataclass(frozen=True)
class Channels:
    """Channels that some layers write and others read; on a residual stream several layers write the same ones.

    Attributes:
        writers: Names of the layers whose output units they are; in the order in which they run.
        norms: Names of the batch norms that they pass through.
        normalised: For each norm, the layer whose output it normalises; None where that is a sum or something else.
        readers: Names of the layers that read them; a linear layer after a flattened map reads several numbers of each.
        size: How many there are.
        features: Whether the network's output is made of them.
    """

    writers: tuple[str, ...]
    norms: tuple[str, ...]
    normalised: tuple[str | None, ...]
    readers: tuple[str, ...]
    size: int
    features: bool

    @property
    def name(self) -> str:
        """That of the first layer that writes them."""
        return self.writers[0]


@dataclass
class _Flow:
    """The channels of one value in the graph: the index of their group, and whether they are a map still."""

    group: int
    is_map: bool


def trace_channels(body: nn.Module) -> list[Channels]:
    """The groups of channels inside ``body``, in the order in which they are first written; its input is none of them.

    Args:
        body: A network of linear and convolution layers, batch norms, ReLU and the like, pooling, flattening and
            residual sums, nested as it may be.

    Raises:
        UnfitNetworkError: Something in it does what cannot be followed; the line names it.
    """
    try:
        graph = fx.symbolic_trace(body).graph
    except Exception as error:  # fx raises whatever the forward does with a proxy
        raise UnfitNetworkError(f"{type(body).__name__}: its layers cannot be followed: {error}") from error
    return _Tracer(body).run(graph)


class _Tracer:
    """Follows channels through a graph, joining the groups of what is added."""

    def __init__(self, body: nn.Module) -> None:
        self.modules = dict(body.named_modules())
        self.flows: dict[fx.Node, _Flow | None] = {}
        # index of the group that each group became part of
        self.parents: list[int] = []
        self.sizes: list[int] = []
        self.writers: list[tuple[str, int]] = []
        self.norms: list[tuple[str, int]] = []
        self.normalised: dict[str, str | None] = {}
        self.readers: list[tuple[str, int]] = []

    def run(self, graph: fx.Graph) -> list[Channels]:
        features: _Flow | None = None
        for node in graph.nodes:
            if node.op == "output":
                features = self._input(node)
            else:
                handle: dict[str, Callable[[fx.Node], _Flow | None]] = {
                    "placeholder": lambda _: _Flow(self._new_group(0), is_map=True),
                    "call_module": self._module,
                    "call_function": self._function,
                    "call_method": self._method,
                }
                self.flows[node] = handle.get(node.op, self._refuse)(node)
        if features is None:
            raise UnfitNetworkError("the network's output is no tensor whose channels could be followed.")
        return self._collect(self._root(features.group))

    def _collect(self, features: int) -> list[Channels]:
        roots = list(dict.fromkeys(self._root(group) for _, group in self.writers))

        def names(pairs: list[tuple[str, int]], root: int) -> tuple[str, ...]:
            return tuple(name for name, group in pairs if self._root(group) == root)

        if not roots:
            raise UnfitNetworkError(
                "the network has no linear or convolution layer whose units could be counted."
            )
        found = []
        for root in roots:
            # added to the network's own input, which nothing can widen
            if root != self._root(0):
                norms = names(self.norms, root)
                normalised = tuple(self.normalised[norm] for norm in norms)
                parts = (names(self.writers, root), norms, normalised, names(self.readers, root))
                found.append(Channels(*parts, self.sizes[root], root == features))
        return found

    def _module(self, node: fx.Node) -> _Flow:
        name = str(node.target)
        module, flow = self.modules[name], self._input(node)
        if isinstance(module, UNIT_LAYERS):
            return self._unit_layer(name, module, flow, node)
        if isinstance(module, BATCH_NORMS):
            self._once(name, self.norms)
            self.norms.append((name, flow.group))
            self.normalised[name] = self._layer_before(node)
            return flow
        if isinstance(module, nn.Flatten) and module.start_dim == 1:
            return _Flow(flow.group, is_map=False)
        if isinstance(module, CHANNELWISE):
            return flow
        return self._refuse(node)

    def _unit_layer(self, name: str, module: Any, flow: _Flow, node: fx.Node) -> _Flow:
        self._once(name, self.writers)
        is_linear = isinstance(module, nn.Linear)
        size = self.sizes[self._root(flow.group)]
        reads = module.in_features if is_linear else module.in_channels
        if (
            getattr(module, "groups", 1) != 1
            or (is_linear and flow.is_map and size)
            or (size and reads % size)
        ):
            return self._refuse(node)
        self.readers.append((name, flow.group))
        group = self._new_group(len(module.weight))
        self.writers.append((name, group))
        return _Flow(group, is_map=not is_linear)

    def _layer_before(self, node: fx.Node) -> str | None:
        """The linear or convolution layer whose very output a module gets, in evaluation."""
        before: Any = node.args[0]
        while before.op == "call_module" and isinstance(self.modules[str(before.target)], PASSING):
            before = before.args[0]
        name = str(before.target)
        is_layer = before.op == "call_module" and isinstance(self.modules[name], UNIT_LAYERS)
        return name if is_layer else None

    def _function(self, node: fx.Node) -> _Flow | None:
        if node.target in ADDITIONS and all(isinstance(one, fx.Node) for one in node.args):
            first, second = (self._of(one) for one in node.args[:2])
            if first.is_map == second.is_map:
                self._join(first.group, second.group)
                return first
        if node.target is torch.flatten and (*node.args[1:], *node.kwargs.values())[:1] == (1,):
            return _Flow(self._input(node).group, is_map=False)
        if node.target in CHANNELWISE_FUNCTIONS:
            return self._input(node)
        if node.target in (getattr, operator.getitem):
            return None
        return self._refuse(node)

    def _method(self, node: fx.Node) -> _Flow | None:
        arguments = tuple(tuple(one) if isinstance(one, list) else one for one in node.args[1:])
        if node.target in CHANNELWISE_METHODS:
            return self._input(node)
        if node.target in ("size", "dim"):
            return None
        flattens = (node.target, *arguments) in (("flatten", 1), ("mean", (2, 3)), ("mean", (-2, -1)))
        keeps_rows = node.target in ("view", "reshape") and len(arguments) == 2 and arguments[1] == -1
        if flattens or keeps_rows:
            return _Flow(self._input(node).group, is_map=False)
        return self._refuse(node)

    def _input(self, node: fx.Node) -> _Flow:
        return self._of(node.args[0])

    def _of(self, argument: Any) -> _Flow:
        flow = self.flows.get(argument)
        return self._refuse(argument) if flow is None else flow

    def _refuse(self, node: Any) -> Any:
        name = str(getattr(node, "target", node))
        kind = f" ({type(self.modules[name]).__name__})" if name in self.modules else ""
        raise UnfitNetworkError(
            f"the channels cannot be followed through {name}{kind}; use a network of linear and convolution layers, "
            "batch norms, ReLU, pooling, flattening and sums."
        )

    def _once(self, name: str, pairs: list[tuple[str, int]]) -> None:
        if any(name == other for other, _ in pairs):
            raise UnfitNetworkError(f"{name} is used twice; a layer that is shared cannot be widened or cut.")

    def _new_group(self, size: int) -> int:
        self.parents.append(len(self.parents))
        self.sizes.append(size)
        return len(self.parents) - 1

    def _root(self, group: int) -> int:
        while self.parents[group] != group:
            group = self.parents[group]
        return group

    def _join(self, one: int, other: int) -> None:
        first, second = sorted((self._root(one), self._root(other)))
        self.parents[second] = first
