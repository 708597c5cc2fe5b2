"""Which hyper-parameters of a network's training are tuned, and over what ranges.

One L2 coefficient for each group of layers, the rate of every dropout, and label smoothing, as in Wenzel et al.,
NeurIPS 2020, section 5. A coefficient ``c`` adds ``c / N * |w|^2`` to the loss, with N the number of training images;
torch's ``weight_decay`` of the same gradient is ``2 c / N``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lifelong_ens.convert import RANK1
from lifelong_ens.ensembles.training import parameter_groups
from lifelong_ens.errors import InputError
from lifelong_ens.training.data import ImageData

Range = tuple[float, float]
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
LABEL_SMOOTHING, LEARNING_RATE = "label_smoothing", "learning_rate"


@dataclass(frozen=True)
class Space:
    """Ranges of hyper-parameters, each positive and explored on a logarithmic scale.

    Attributes:
        ranges: Lowest and highest value of each, by name.
        num_images: N, that L2 coefficients are divided by.
        layers: For every linear layer and convolution the names of its weight's and its bias's L2 coefficient.
        dropouts: For every dropout the name of its rate.
    """

    ranges: Mapping[str, Range]
    num_images: int
    layers: Mapping[str, tuple[str, str]]
    dropouts: Mapping[str, str]

    def index(self, name: str) -> int:
        """Where a hyper-parameter stands among all."""
        return list(self.ranges).index(name)

    @property
    def low(self) -> Tensor:
        """Lowest values, ``(hyper-parameters,)``."""
        return torch.tensor([low for low, _ in self.ranges.values()])

    @property
    def high(self) -> Tensor:
        """Highest values, ``(hyper-parameters,)``."""
        return torch.tensor([high for _, high in self.ranges.values()])

    def draw(self, generator: torch.Generator) -> dict[str, float]:
        """One value of each, log-uniform."""
        shares = torch.rand(len(self.ranges), dtype=torch.double, generator=generator).tolist()
        return {
            name: low * (high / low) ** share
            for share, (name, (low, high)) in zip(shares, self.ranges.items(), strict=True)
        }


def hyper_space(
    network: nn.Module,
    num_images: int,
    *,
    l2: Range,
    label_smoothing: Range | None = None,
    dropout: Range | None = None,
    learning_rate: Range | None = None,
) -> Space:
    """What can be tuned on a network; None leaves a kind out.

    Args:
        network: Its layers and dropouts are looked at.
        num_images: Training images.
        l2: Lowest and highest L2 coefficient, as in the head of this module.
        label_smoothing: Lowest and highest share of the target that goes to all classes alike.
        dropout: Lowest and highest rate, of each dropout in the network.
        learning_rate: Lowest and highest.

    Raises:
        InputError: A range is not one of positive numbers, or the network has no layer to regularise.
    """
    layers = layer_groups(network)
    if not layers:
        raise InputError(
            f"{type(network).__name__} has no linear layer or convolution whose weights could be tuned."
        )
    dropouts = {}
    if dropout is not None:
        names = (name for name, module in network.named_modules() if type(module) in DROPOUTS)
        dropouts = {name: f"dropout_{name}" for name in names}
    # the order of the groups is that of the layers
    ranges = dict.fromkeys((group for groups in layers.values() for group in groups), l2)
    ranges |= {name: dropout for name in dropouts.values() if dropout is not None}
    if label_smoothing is not None:
        ranges[LABEL_SMOOTHING] = label_smoothing
    if learning_rate is not None:
        ranges[LEARNING_RATE] = learning_rate
    for name, (low, high) in ranges.items():
        shares = name == LABEL_SMOOTHING or name in dropouts.values()
        if not 0 < low < high or (shares and not high < 1):
            top = " < 1" if shares else ""
            raise InputError(f"the range of {name} is {low} to {high}; expected 0 < lowest < highest{top}.")
    return Space(ranges, num_images, layers, dropouts)


def layer_groups(network: nn.Module) -> dict[str, tuple[str, str]]:
    """L2 groups of the weight and the bias of every linear layer and convolution, by the layer's name.

    The first layer, the weight of the last and its bias have a coefficient each; the layers between, in their order,
    share three, a third each: the three stages of a Wide ResNet. Norms have none.
    """
    names = [
        name
        for name, module in network.named_modules()
        if type(module) in RANK1 and "weight" in module._parameters
    ]
    groups = {}
    for position, name in enumerate(names):
        if position == len(names) - 1:
            groups[name] = ("l2_output", "l2_output_bias")
        else:
            third = 3 * (position - 1) // max(len(names) - 2, 1) + 1
            groups[name] = (("l2_input",) if position == 0 else (f"l2_{third}",)) * 2
    if names and network.get_submodule(names[-1]).bias is None:
        groups[names[-1]] = ("l2_output", "l2_output")
    return groups


def decay_groups(network: nn.Module, space: Space, values: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameter groups with the weight decay that the L2 coefficients among ``values`` stand for.

    Everything else is as in ``parameter_groups``.
    """
    decays: dict[int, float] = {}
    for name, groups in space.layers.items():
        layer = network.get_submodule(name)
        for parameter, group in zip((layer.weight, layer.bias), groups, strict=True):
            if isinstance(parameter, nn.Parameter):
                decays[id(parameter)] = 2 * values[group] / space.num_images
    found = []
    for group in parameter_groups(network):
        by_decay: dict[float | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_decay.setdefault(decays.get(id(parameter)), []).append(parameter)
        for decay, parameters in by_decay.items():
            own = {} if decay is None else {"weight_decay": decay}
            found.append({**group, "params": parameters, **own})
    return found


def needed_validation(
    method: str, train: ImageData, validation: ImageData | None, num_members: int
) -> ImageData:
    """The validation images that a method chooses by.

    Raises:
        InputError: There are none, or fewer than classes, or no member is asked for.
    """
    if num_members < 1:
        raise InputError(f"an ensemble has at least one member, not {num_members}.")
    if validation is None:
        raise InputError(f"{method} needs validation images; give --validation 0.1.")
    if len(validation) < train.num_classes:
        raise InputError(
            f"{method} needs at least one validation image per class: {len(validation)} for {train.num_classes} "
            "classes are too few; give a larger --validation."
        )
    return validation
