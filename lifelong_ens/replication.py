"""Rows shown to several members: stacked in one pass, replicated as late as possible, or one member after the other."""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import _disable_current_modes

from lifelong_ens.layers.bank import Selection
from lifelong_ens.layers.exported import joined
from lifelong_ens.layers.plan import Call, constants_of, in_turn
from lifelong_ens.layers.rank1 import Rank1Layer

# what surely gives a tensor with the batch on its first axis, when its input does
_TENSOR_FUNCTIONS = {torch.relu, F.relu, torch.flatten, torch.add, operator.add, operator.iadd}
# with a mask of its own for every copy of a row
_RANDOM = (nn.modules.dropout._DropoutNd,)


class Replication:
    """Shows rows to several members of a network, in the fastest of three ways that give the same answer.

    Stacked, rows of all members go through the network in one pass; where its graph can be traced, the layers before
    the first one that tells members apart run once. In turn, the rows go through the network once for every member,
    whose layers then make their dense weights: that costs passes over the weights instead of the activations, and
    tensors stay small enough for caches. The sizes of all layers decide, see ``lifelong_ens.layers.plan.in_turn``.

    Args:
        body: A network whose layers read ``selection``.
        selection: Whose member is selected.
        has_members: Whether a layer tells members apart.
    """

    def __init__(
        self, body: nn.Module, selection: Selection, has_members: Callable[[nn.Module], bool]
    ) -> None:
        self.body, self.selection, self.has_members = body, selection, has_members
        self.late = replicate_late(body, has_members)
        self._sizes: dict[tuple[Any, ...], tuple[Call, ...]] = {}

    def __call__(self, x: Tensor, members: tuple[int, ...]) -> Any:
        """Every row to every member: ``(batch, ...)`` to ``(members, batch, ...)``."""
        if self.in_turn(x, len(members)):
            return joined([self._one(x, member) for member in members], torch.stack)
        with self.selection.of(members):
            rows = self.body(replicate(x, len(members))) if self.late is None else self.late(x, len(members))
        return by_member_first(rows, len(members), len(x))

    def split(self, x: Tensor, members: tuple[int, ...]) -> Any:
        """Blocks of equal length to a member each: ``(batch, ...)`` to ``(batch, ...)``."""
        rows = len(x) // len(members)
        if self.in_turn(x[:rows], len(members)):
            blocks = zip(x.split(rows), members, strict=True)
            return joined([self._one(block, member) for block, member in blocks], torch.cat)
        with self.selection.of(members):
            return self.body(x)

    def in_turn(self, x: Tensor, num_members: int) -> bool:
        """Whether these rows go through the network once for every one of so many members."""
        # one graph serves all members
        compiled = torch.compiler.is_compiling() or self.body._compiled_call_impl is not None
        if self.late is not None or compiled or not len(x) or self._mixes_rows():
            return False
        key = (x.shape[1:], x.dtype)
        if key not in self._sizes:
            self._sizes[key] = self._calls(x[:1])
        learning = self.body.training and torch.is_grad_enabled()
        return in_turn(self._sizes[key], len(x), num_members, learning, constants_of(x.device.type))

    def _one(self, x: Tensor, member: int) -> Any:
        with self.selection.of(member):
            return self.body(x)

    def _mixes_rows(self) -> bool:
        """Whether a norm shared by the members computes statistics of all rows together."""
        return any(isinstance(one, _NormBase) and one.training for one in self.body.modules())

    def _calls(self, row: Tensor) -> tuple[Call, ...]:
        """What is known of the call of every rank-1 layer for one row of one member."""
        found: list[Call] = []

        def note(layer: Rank1Layer, inputs: tuple[Tensor, ...]) -> None:
            found.append(layer.plan(inputs[0]).call)

        with unobserved(self.body), self.selection.of(0):
            handles = [
                one.register_forward_pre_hook(note)
                for one in self.body.modules()
                if isinstance(one, Rank1Layer)
            ]
            try:
                self.body(row)
            finally:
                for handle in handles:
                    handle.remove()
        return tuple(found)


def by_member_first(out: Any, times: int, batch: int) -> Any:
    """``(members * batch, ...)`` as ``(members, batch, ...)``, in a tuple each tensor."""
    if isinstance(out, tuple):
        return tuple(by_member_first(one, times, batch) for one in out)
    return out.unflatten(0, (times, batch)) if isinstance(out, Tensor) else out


@contextmanager
def unobserved(network: nn.Module) -> Iterator[None]:
    """Inside, the network is in evaluation mode without gradients, and nobody who watches its calls sees any."""
    modules = list(network.modules())
    before = [(one, one.training, one._forward_hooks, one._forward_pre_hooks) for one in modules]
    for one in modules:
        one.training, one._forward_hooks, one._forward_pre_hooks = False, OrderedDict(), OrderedDict()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _disable_current_modes():
            yield
    finally:
        for one, training, hooks, pre_hooks in before:
            one.training, one._forward_hooks, one._forward_pre_hooks = training, hooks, pre_hooks


class _Tracer(fx.Tracer):
    """Traces down to torch's own layers, and to those with members."""

    def __init__(self, has_members: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.has_members = has_members

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether it is one node of the graph."""
        return self.has_members(m) or super().is_leaf_module(m, module_qualified_name)


def replicate_late(body: nn.Module, has_members: Callable[[nn.Module], bool]) -> fx.GraphModule | None:
    """``body`` as a function of its input and a number of copies, which are made where members first differ.

    ``(batch, ...)`` becomes ``(copies * batch, ...)``, one block for every copy, on each path into a layer that has
    members; what is before runs once. It uses the layers of ``body`` themselves.

    Args:
        body: A network of one input.
        has_members: Whether a layer tells members apart.

    Returns:
        None where nothing would be saved, or where the graph cannot be told from the code: then the input is to be
        replicated.
    """
    try:
        graph = _Tracer(has_members).trace(body)
    except Exception:  # whatever a network's own code does with something that is no tensor
        return None
    modules = dict(body.named_modules())
    before: set[fx.Node] = set()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in graph.nodes:
        if node.op == "placeholder" or (
            all(one in before for one in node.all_input_nodes) and node.op != "output"
        ):
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            if module is None or not (has_members(module) or isinstance(module, _RANDOM)):
                before.add(node)
    saves = any(node.op == "call_module" and _computes(modules[str(node.target)]) for node in before)
    borders = [node for node in before if any(user not in before for user in node.users)]
    if len(inputs) != 1 or not saves or not all(map(_is_rows, borders)):
        return None
    with graph.inserting_after(inputs[0]):
        copies = graph.placeholder("copies")
    for node in borders:
        users = [user for user in node.users if user not in before]
        with graph.inserting_after(copies if node is inputs[0] else node):
            repeated = graph.call_function(replicate, (node, copies))
        for user in users:
            user.replace_input_with(node, repeated)
    graph.lint()
    return fx.GraphModule(body, graph)


def sole_readers(
    body: nn.Module, has_members: Callable[[nn.Module], bool]
) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs of layers of which the second alone reads what the first gives, each called once; none if not traceable.

    Args:
        body: A network of one input.
        has_members: Whether a layer tells members apart.
    """
    try:
        graph = _Tracer(has_members).trace(body)
    except Exception:  # see replicate_late
        return []
    modules = dict(body.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    once = {
        module for module, count in Counter(modules[str(node.target)] for node in calls).items() if count == 1
    }
    pairs = []
    for node in calls:
        readers = list(node.users)
        if len(readers) == 1 and readers[0].op == "call_module" and len(node.args) == 1:
            first, second = modules[str(node.target)], modules[str(readers[0].target)]
            if first in once and second in once:
                pairs.append((first, second))
    return pairs


def replicate(x: Tensor, copies: int) -> Tensor:
    """``(batch, ...)`` to ``(copies * batch, ...)``, a block for every copy, in the memory format of ``x``."""
    # repeat would give the default format
    return x if copies == 1 else torch.cat([x] * copies)


def _computes(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _is_rows(node: fx.Node) -> bool:
    """Whether the value surely is a tensor of rows; a size, say, must not be replicated."""
    return node.op in ("call_module", "placeholder") or (
        node.op == "call_function" and node.target in _TENSOR_FUNCTIONS
    )
