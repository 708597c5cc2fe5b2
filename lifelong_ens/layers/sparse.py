"""Sparse networks in training: how many weights each layer has, which they are, and how they move.

Sources: Mocanu et al. 2018 (SET: random growth), Evci et al., ICML 2020 (RigL: growth by gradient, the allocation ERK),
Liu et al., ICLR 2022 (FreeTickets, their released code). A sparse layer runs dense, with zeros; what sparsity saves is
storage, and products that hardware could leave out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from lifelong_ens.errors import InputError, UnfitNetworkError
from lifelong_ens.layers.masked import largest
from lifelong_ens.layers.structured import UNIT_LAYERS

Growth = Literal["gradient", "random"]
Init = Literal["scaled", "plain"]


def maskable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that masks are for, by name: of every linear and convolution layer, first and last included.

    Biases, norms, embeddings and attention's input projection are not.

    Raises:
        UnfitNetworkError: The network has none that is trained.
    """
    layers = {
        id(module._parameters.get("weight"))
        for module in network.modules()
        if isinstance(module, UNIT_LAYERS)
    }
    # a weight that two layers share has one name, and so one mask
    found = {name: one for name, one in network.named_parameters() if id(one) in layers and one.requires_grad}
    if not found:
        raise UnfitNetworkError(
            f"{type(network).__name__} has no linear or convolution weight to train: nothing to make sparse."
        )
    return found


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """The share of weights that each layer keeps under ERK: in proportion to ``sum(shape) / prod(shape)``.

    Layers that would keep more than all of their weights are dense, and the others share what is left, so that
    ``density`` is that of all together (Evci et al. 2020, appendix; for linear layers the Erdos-Renyi rule of SET).

    Args:
        shapes: Of the weights, the units first: ``(out, in)`` or ``(out, in, height, width)``.
        density: Of all layers together, in (0, 1).
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        free = [layer for layer in range(len(shapes)) if layer not in dense]
        if not free:
            return [1.0] * len(shapes)
        budget = density * sum(sizes) - sum(sizes[layer] for layer in dense)
        scale = budget / sum(raw[layer] * sizes[layer] for layer in free)
        most = max(raw[layer] for layer in free)
        if scale * most <= 1:
            return [1.0 if layer in dense else scale * raw[layer] for layer in range(len(shapes))]
        dense |= {layer for layer in free if raw[layer] == most}


def erk_counts(shapes: Sequence[Sequence[int]], density: float) -> list[int]:
    """How many weights each layer keeps under ERK: integers whose sum is ``round(density * all)`` exactly.

    Every layer has its share rounded down; what is missing goes, one weight each, to the layers that lost the largest
    fraction, the first of equals first.

    Raises:
        InputError: A layer is left with no weight at all.
    """
    sizes = [math.prod(shape) for shape in shapes]
    shares = [d * size for d, size in zip(erk_densities(shapes, density), sizes, strict=True)]
    # a share that is whole but for the last bits of its floating point number is whole
    counts = [math.floor(share + 1e-6) for share in shares]
    lost = sorted(range(len(shares)), key=lambda layer: counts[layer] - shares[layer])
    for layer in lost[: max(round(density * sum(sizes)) - sum(counts), 0)]:
        counts[layer] += 1
    if not all(counts):
        raise InputError(
            f"sparsity {1 - density:g} leaves layer {counts.index(0) + 1} of {len(counts)} no weight; take a lower one."
        )
    return counts


class Masks:
    """Which weights of a network may be other than zero.

    Masks are for training: a trained network has the zeros themselves, and is stored as bits and values by its
    ensemble. A weight that its mask allows may still be zero, as when it was just grown: it then counts as a zero
    wherever zeros are counted.

    Attributes:
        active: By the name of the weight, booleans in its shape.

    Args:
        network: Its weights are set to zero where masks say so, here and at every ``apply``.
        active: A mask for each of its ``maskable`` weights.
    """

    def __init__(self, network: nn.Module, active: Mapping[str, Tensor]) -> None:
        self._weights = maskable(network)
        self.active = {name: active[name].to(weight.device) for name, weight in self._weights.items()}
        self.apply()

    @classmethod
    def random(
        cls, network: nn.Module, sparsity: float, generator: torch.Generator, init: Init = "plain"
    ) -> Self:
        """Masks drawn at random, with the exact numbers of ``erk_counts``.

        Args:
            network: Whose weights they are for.
            sparsity: Share of all maskable weights that is zero, in (0, 1).
            generator: Of the CPU.
            init: ``plain`` leaves the other weights as they are; ``scaled`` divides them by the root of their layer's
                density, so that its outputs vary as much as those of the dense layer.
        """
        if init not in get_args(Init):
            raise InputError(f"init is {' or '.join(get_args(Init))}, not {init}.")
        weights = maskable(network)
        counts = erk_counts([weight.shape for weight in weights.values()], 1 - checked_sparsity(sparsity))
        active = {}
        for (name, weight), count in zip(weights.items(), counts, strict=True):
            active[name] = torch.zeros(weight.numel(), dtype=torch.bool)
            active[name][torch.randperm(weight.numel(), generator=generator)[:count]] = True
            active[name] = active[name].view(weight.shape)
            if init == "scaled":
                weight.data.mul_((weight.numel() / count) ** 0.5)
        return cls(network, active)

    @classmethod
    def by_magnitude(cls, network: nn.Module, sparsity: float) -> Self:
        """Masks that keep the largest weights of all layers together, ``round((1 - sparsity) * all)`` of them."""
        weights = maskable(network)
        sizes = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
        kept = largest(sizes, round((1 - checked_sparsity(sparsity)) * len(sizes)))
        parts = kept.split([weight.numel() for weight in weights.values()])
        active = {
            name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)
        }
        return cls(network, active)

    def __len__(self) -> int:
        """Weights that may be other than zero."""
        return sum(int(mask.sum()) for mask in self.active.values())

    def density_of(self, weight: Tensor) -> float:
        """The share of a weight that its mask leaves; 1 for a tensor without mask."""
        for name, own in self._weights.items():
            if own is weight:
                return float(self.active[name].float().mean())
        return 1.0

    @torch.no_grad()
    def apply(self) -> None:
        """Set every weight without connection to zero: after each step, momentum and weight decay have moved it."""
        for name, weight in self._weights.items():
            # not a product, which leaves negative zeros
            weight.masked_fill_(~self.active[name], 0.0)

    @torch.no_grad()
    def update(self, rate: float, growth: Growth, generator: torch.Generator) -> dict[nn.Parameter, Tensor]:
        """Prune and grow, layer by layer: as many connections end as begin, and begin at exactly zero.

        Of the ``n`` connections of a layer the ``ceil(rate * n)`` with the smallest weights end; of equals the last.
        As many begin, among all positions without one, those that just ended included: where the ``gradient`` of the
        last step is largest (of equals the first), or a ``random`` sample without replacement. A layer whose mask is
        full, as ERK leaves small ones, keeps all its weights.

        Args:
            rate: In [0, 1].
            growth: What decides where connections begin.
            generator: Of the CPU, for the sample.

        Returns:
            For each weight, where connections began.
        """
        grown = {}
        for name, weight in self._weights.items():
            mask = self.active[name]
            count = int(mask.sum())
            # 0.1 * 30 is a little more than 3
            moved = math.ceil(rate * count - 1e-9)
            if count == mask.numel() or not moved:
                continue
            kept = largest(weight.abs().masked_fill(~mask, -1), count - moved)
            if growth == "gradient":
                grown[weight] = largest(self._gradient(name).abs().masked_fill(kept, -1), moved)
            else:
                free = (~kept).flatten().nonzero().squeeze(1)
                sample = torch.randperm(len(free), generator=generator)[:moved].to(free.device)
                began = torch.zeros_like(kept).flatten()
                began[free[sample]] = True
                grown[weight] = began.view(kept.shape)
            self.active[name] = kept | grown[weight]
            weight.masked_fill_(~kept, 0.0)
        return grown

    def _gradient(self, name: str) -> Tensor:
        gradient = self._weights[name].grad
        if gradient is None:
            raise RuntimeError(f"growth by gradient: {name} has no gradient; make a step first.")
        return gradient


def checked_sparsity(sparsity: float) -> float:
    """The sparsity itself; an InputError where it is not in (0, 1)."""
    if not 0 < sparsity < 1:
        raise InputError(f"sparsity is between 0 and 1, the share of weights that is zero, not {sparsity}.")
    return sparsity


def forget(optimizer: torch.optim.Optimizer, grown: Mapping[nn.Parameter, Tensor]) -> None:
    """Set the optimizer's state of weights to zero where connections began, as RigL does: momentum, Adam's moments."""
    for weight, began in grown.items():
        for state in optimizer.state[weight].values():
            if isinstance(state, Tensor) and state.shape == weight.shape:
                state.masked_fill_(began, 0.0)
