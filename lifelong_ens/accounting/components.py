"""Which line of the ledger a tensor or a computation belongs to, and how much is stored there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lifelong_ens.layers.norm import MemberBatchNorm, MemberGroupNorm, MemberLayerNorm

NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    MemberBatchNorm,
    MemberLayerNorm,
    MemberGroupNorm,
)


@dataclass(frozen=True)
class Size:
    """What one component stores: learned numbers, and bytes at their true dtype."""

    parameters: int = 0
    bytes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.parameters + other.parameters, self.bytes + other.bytes)


def component_of_modules(network: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every module once, with its component: its own attribute ``component``, else that of what holds it."""
    seen: set[int] = set()
    stack: list[tuple[nn.Module, str]] = [(network, "shared")]
    while stack:
        module, inherited = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        own = getattr(module, "component", None)
        component = own if isinstance(own, str) else inherited
        yield module, component
        stack.extend((child, component) for child in module.children())


def stored_tensors(network: nn.Module) -> Iterator[tuple[str, bool, Tensor]]:
    """Component, whether learned, and tensor, for all that ``state_dict`` holds; a tied tensor comes once.

    Parameters are learned, and so are buffers of a module whose attribute ``learned`` is true (committed
    members). Affine numbers and statistics of norms have components of their own unless something above them
    claims them.
    """
    seen: set[int] = set()
    for module, component in component_of_modules(network):
        shared_norm = component == "shared" and isinstance(module, NORMS)
        parameter_component = "norm_affine" if shared_norm else component
        buffer_component = "norm_statistics" if shared_norm else component
        learned = bool(getattr(module, "learned", False))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen or name in module._non_persistent_buffers_set:
                continue
            seen.add(id(tensor))
            is_parameter = name in module._parameters
            yield parameter_component if is_parameter else buffer_component, is_parameter or learned, tensor


def sizes(network: nn.Module) -> dict[str, Size]:
    """What each component stores. Statistics and masks have bytes but no parameters."""
    totals: dict[str, Size] = {}
    for component, learned, tensor in stored_tensors(network):
        size = Size(tensor.numel() if learned else 0, tensor.numel() * tensor.element_size())
        totals[component] = totals.get(component, Size()) + size
    return {component: size for component, size in totals.items() if size.bytes}


def optimizer_size(optimizer: torch.optim.Optimizer) -> Size:
    """Bytes of the optimizer's state, such as momentum; nothing of it is a parameter."""
    tensors = (
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
    return Size(0, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
