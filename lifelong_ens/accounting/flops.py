"""Floating-point operations of what really runs, by component. One multiply-accumulate is 2 FLOPs.

Counted are matrix products, convolutions and attention, forward and backward, by the shapes of the operations
as they are dispatched, so that a gradient that nobody needs costs nothing; and, apart, the products of rank-1
layers. Not counted, as is usual: biases, norms, activations, losses, optimizers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from lifelong_ens.accounting.components import component_of_modules
from lifelong_ens.layers.hyper import HyperLayer
from lifelong_ens.layers.pairs import Pairs
from lifelong_ens.layers.rank1 import Rank1Layer
from lifelong_ens.layers.structured import UNIT_LAYERS
from lifelong_ens.training.loop import evaluating

aten = torch.ops.aten


class FlopMeter:
    """Counts the FLOPs of everything that runs inside a with-block.

    Attributes:
        by_component: Forward FLOPs of each component; rank-1 products under ``fast_weights``.
        backward: FLOPs of the backward passes, rank-1 products left out.
        rank1_backward: FLOPs of the gradients of ``rank1_forward``.

    Args:
        network: Its modules say which component an operation belongs to.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.by_component: Counter[str] = Counter()
        self.backward = self.rank1_backward = 0
        self._stack: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._mode = _Dispatch(self._add)

    @property
    def total(self) -> int:
        """All FLOPs, forward and backward."""
        return sum(self.by_component.values()) + self.backward + self.rank1_backward

    @property
    def rank1_forward(self) -> int:
        """FLOPs of the products of fast weights, with each other, with activations or with the shared weight."""
        return self.by_component.get("fast_weights", 0)

    @property
    def rank1(self) -> int:
        """FLOPs of rank-1 products, forward and backward."""
        return self.rank1_forward + self.rank1_backward

    def __enter__(self) -> Self:
        for module, component in component_of_modules(self.network):
            self._handles += self._hook(module, component)
        self._mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._mode.__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()

    def _add(self, flops: int) -> None:
        if self._stack:
            self.by_component[self._stack[-1]] += flops
        else:
            self.backward += flops

    def _hook(self, module: nn.Module, component: str) -> list[RemovableHandle]:
        def enter(*_: Any) -> None:
            self._stack.append(component)

        def leave(*_: Any) -> None:
            self._stack.pop()

        handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        if isinstance(module, Rank1Layer):
            handles.append(module.register_forward_hook(self._count_rank1))
        if isinstance(module, Pairs):
            handles.append(module.register_forward_hook(self._count_pairs))
        if isinstance(module, HyperLayer):
            handles.append(module.register_forward_hook(self._count_response))
        return handles

    def _count_rank1(self, layer: Rank1Layer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        mode = layer.mode(inputs[0])
        count = _scaled if mode in ("scale", "pairs") else _merged
        forward, backward = count(layer, inputs[0], output)
        self.by_component["fast_weights"] += forward
        self.rank1_backward += backward if torch.is_grad_enabled() else 0

    def _count_response(self, layer: HyperLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # the response times e; backward, one product towards either
        self.by_component["embedding"] += output.numel()
        self.backward += 2 * output.numel() * torch.is_grad_enabled()

    def _count_pairs(self, pairs: Pairs, inputs: tuple[int], matrix: Tensor) -> None:
        # the forward product is seen as it runs; so are its two gradients, but among those of everything else
        gradients = 2 * 2 * pairs.num_pairs * matrix.numel() * matrix.requires_grad
        self.rank1_backward += gradients
        self.backward -= gradients


def _scaled(layer: Rank1Layer, x: Tensor, y: Tensor) -> tuple[int, int]:
    """``x * r`` and ``y * s``: one product per element; backward one towards the input, two towards the vector.

    Both as often as there are pairs; the second not where the norm after the layer does it on its own numbers. Where
    the shared weight learns, ``x * r`` is made once more.
    """
    pairs = 1 if layer.more is None else 1 + layer.more.num_pairs
    backward = x.numel() * layer.get_parameter("weight").requires_grad * _is_ours(layer)
    for bank, tensor in ((layer.r, x), (layer.s, y)):
        learns = bank.active is not None and bank.active.requires_grad
        backward += tensor.numel() * (2 * learns + tensor.requires_grad)
    return pairs * (x.numel() + y.numel() * (not layer.deferred)), pairs * backward


def _merged(layer: Rank1Layer, x: Tensor, y: Tensor) -> tuple[int, int]:
    """``W * (s r^T)`` for each member: the outer product and one product per weight, and the sums with ``Pairs``.

    Backward, the gradient of the product is multiplied by W and summed over the kernel, then by r and by s, and by
    ``s r^T`` where W learns too. With a frozen W, in training, the gradients of r and s are sums of products over the
    input and the output instead. The products inside ``Pairs`` are counted as they run.
    """
    weight = layer.get_parameter("weight")
    outer = weight.shape[0] * weight.shape[1]
    forward = outer + weight.numel()
    members = set(layer.selected())
    if layer.more is not None or layer.added is not None:
        forward += outer * (layer.more is not None) + weight.numel() * (layer.added is not None)
    learning = sum(layer.r.row(member).requires_grad for member in members)
    if len(members) == 1 and _is_ours(layer) and x.requires_grad and not weight.requires_grad:
        return forward * len(members), 2 * (x.numel() + y.numel()) * learning
    # s r^T is made again where the backward pass is ours, which keeps the dense weight alone
    backward = 2 * weight.numel() + (4 + (len(members) == 1 and _is_ours(layer))) * outer
    own = weight.numel() * weight.requires_grad * len(members)
    return forward * len(members), backward * learning + own


def _is_ours(layer: Rank1Layer) -> bool:
    """Whether the backward pass is that of ``lifelong_ens.layers.products``, which keeps less than autograd."""
    return layer.training and layer.more is None and layer.added is None


class _Dispatch(TorchDispatchMode):
    """Sees every operation below autograd and reports the FLOPs of those that have a formula."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self.report = report

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        # inference mode shows composite operations whole; elsewhere autograd has taken them apart before
        composite = torch.is_inference_mode_enabled() and func is not torch.ops.prim.device.default
        if composite and packet not in flop_registry:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if packet is aten.convolution_backward:
            self.report(_convolution_backward(*args))
        elif packet in flop_registry:
            self.report(flop_registry[packet](*args, **kwargs, out_val=out))
        return out


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    """Gradients that were asked for, each as many products as the forward pass, groups included.

    Torch's own formula counts grouped weight gradients as if they were dense.
    """
    output_mask = rest[-1]
    transposed = rest[4]
    positions = (x if transposed else grad).shape[2:].numel() * len(grad)
    forward = 2 * positions * weight.numel()
    return forward * (int(output_mask[0]) + int(output_mask[1]))


def forward_flops(network: nn.Module, run: Callable[[], object]) -> FlopMeter:
    """Count one forward pass in evaluation mode without gradients; nothing of the network changes."""
    with evaluating(network), FlopMeter(network) as meter:
        run()
    return meter


class LayerCall(NamedTuple):
    """One run of a linear or convolution layer.

    Attributes:
        weight: The layer's.
        flops: Of this run.
        input_learns: Whether training computes the gradient of its input: not that of images.
    """

    weight: Tensor
    flops: float
    input_learns: bool


def layer_calls(network: nn.Module, x: Tensor, gradients: bool = False) -> list[LayerCall]:
    """Every run of a linear or convolution layer that ``x`` causes, in their order; nothing of the network changes.

    Args:
        network: On any device, meta too.
        x: Inputs ``(batch, ...)``.
        gradients: Whether to find out which inputs learn; takes the memory of a training step.
    """
    found: list[LayerCall] = []

    def note(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        flops = 2.0 * output.numel() * layer.weight[0].numel()
        found.append(LayerCall(layer.weight, flops, inputs[0].requires_grad))

    layers = [module for module in network.modules() if isinstance(module, UNIT_LAYERS)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with evaluating(network), torch.set_grad_enabled(gradients):
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    return found
