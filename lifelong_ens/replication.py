"""Members that show themselves late: layers before the first one with members run once per input."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# what surely gives a tensor with the batch on its first axis, when its input does
_TENSOR_FUNCTIONS = {torch.relu, F.relu, torch.flatten, torch.add, operator.add, operator.iadd}
# with a mask of its own for every copy of a row
_RANDOM = (nn.modules.dropout._DropoutNd,)


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
