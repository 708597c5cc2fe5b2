"""Small networks of the field, each a body with features or, with ``num_classes``, a classifier.

Every builder takes ``input_shape`` ``(C, H, W)`` and says in one line when it does not fit. The returned
module has ``num_features``, the length of the features that a head reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.errors import InputError

Shape = tuple[int, int, int]


class Body(nn.Module):
    """Layers that turn images ``(batch, C, H, W)`` into features, with an optional classifier on top."""

    def __init__(self, features: nn.Module, num_features: int, num_classes: int | None) -> None:
        super().__init__()
        self.features = features
        self.num_features = num_features
        self.fc = nn.Identity() if num_classes is None else nn.Linear(num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(batch, num_features)``; logits ``(batch, num_classes)`` where there is a classifier."""
        return self.fc(self.features(x))


def mlp(
    num_classes: int | None = None, *, input_shape: Shape = (1, 28, 28), hidden: Sequence[int] = (256, 256)
) -> Body:
    """Fully connected ReLU layers on the flattened image.

    Args:
        num_classes: Width of the classifier; None for a body without one.
        input_shape: ``(C, H, W)`` of one image.
        hidden: Widths of the hidden layers.
    """
    widths = [input_shape[0] * input_shape[1] * input_shape[2], *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return Body(nn.Sequential(*layers), widths[-1], num_classes)


def lenet5(num_classes: int | None = None, *, input_shape: Shape = (3, 32, 32), width: float = 1.0) -> Body:
    """LeNet-5 with ReLU and max pooling: two 5x5 convolutions (6, 16), fully connected 120 and 84.

    61,156 weights without a classifier for 3x32x32 images: the network that reproduces the memory column of
    BatchEnsemble's cost table (Wen et al., ICLR 2020, Table 1).

    Args:
        num_classes: Width of the classifier; None for a body without one.
        input_shape: ``(C, H, W)`` of one image, at least 16x16.
        width: Multiplies the number of channels and units of every layer, rounded and at least one.
    """
    if not width > 0:
        raise InputError(f"width is {width}; expected a number above 0, 1 for LeNet-5 itself.")
    channels, *sides = input_shape
    out_height, out_width = (((side - 4) // 2 - 4) // 2 for side in sides)
    if out_height < 1 or out_width < 1:
        raise InputError(
            f"lenet5 needs images of at least 16x16, these are {sides[0]}x{sides[1]}: "
            "use --network mlp, or enlarge them with --image_size 32."
        )
    first, second, third, fourth = (max(round(width * size), 1) for size in (6, 16, 120, 84))
    features = nn.Sequential(
        nn.Conv2d(channels, first, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * out_height * out_width, third),
        nn.ReLU(),
        nn.Linear(third, fourth),
        nn.ReLU(),
    )
    return Body(features, fourth, num_classes)


def vgg11_half(
    num_classes: int | None = None, *, input_shape: Shape = (3, 32, 32), batch_norm: bool = False
) -> Body:
    """VGG-11 with half the channels: eight 3x3 convolutions, 2,304,864 convolution weights for RGB images.

    The backbone of Structured Ensembles' continual-learning experiments (Pomponi et al. 2021, the package
    ``continual-learning``). There it is pooled to 7x7 and each task has a head of 12544-6272-3136 units, 98 M weights;
    here it is pooled to 1x1 and each task's head is one linear layer on 256 features, as with every other network.

    Args:
        num_classes: Width of the classifier; None for a body without one.
        input_shape: ``(C, H, W)`` of one image, at least 32x32.
        batch_norm: A BatchNorm after each convolution; the original has none.
    """
    channels, height, width = input_shape
    if min(height, width) < 32:
        raise InputError(
            f"vgg11_half needs images of at least 32x32, these are {height}x{width}: "
            "enlarge them with --image_size 32, or use --network mlp."
        )
    layers: list[nn.Module] = []
    for out in (32, 0, 64, 0, 128, 128, 0, 256, 256, 0, 256, 256, 0):
        if not out:
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, out, 3, padding=1))
        layers += [nn.BatchNorm2d(out), nn.ReLU()] if batch_norm else [nn.ReLU()]
        channels = out
    return Body(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels, num_classes)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, a 1x1 convolution where the shape changes (He et al. 2016)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, C_in, H, W)`` to ``(batch, C_out, H / stride, W / stride)``."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def _resnet(input_shape: Shape, widths: Sequence[int], blocks: int, num_classes: int | None) -> Body:
    stem = nn.Conv2d(input_shape[0], widths[0], 3, padding=1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(widths[0]), nn.ReLU()]
    before = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(BasicBlock(before, width, stride=2 if stage and not block else 1))
            before = width
    return Body(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), before, num_classes)


def resnet18(num_classes: int | None = None, *, input_shape: Shape = (3, 32, 32), width: int = 64) -> Body:
    """ResNet-18 for small images: 3x3 stem, four stages of two blocks, widths 1, 2, 4, 8 times ``width``.

    ``width=20`` is the reduced network of Lopez-Paz and Ranzato (GEM, 2017): 1,090,140 convolution weights.

    Args:
        num_classes: Width of the classifier; None for a body without one.
        input_shape: ``(C, H, W)`` of one image.
        width: Channels of the first stage.
    """
    return _resnet(input_shape, [width, 2 * width, 4 * width, 8 * width], 2, num_classes)


def resnet20(num_classes: int | None = None, *, input_shape: Shape = (3, 32, 32), width: int = 16) -> Body:
    """CIFAR ResNet-20 (He et al. 2016, section 4.2), 1x1 convolutions as shortcuts where the shape changes.

    Args:
        num_classes: Width of the classifier; None for a body without one.
        input_shape: ``(C, H, W)`` of one image.
        width: Channels of the first stage.
    """
    return _resnet(input_shape, [width, 2 * width, 4 * width], 3, num_classes)


def resnet32(num_classes: int | None = None, *, input_shape: Shape = (3, 32, 32), width: int = 16) -> Body:
    """CIFAR ResNet-32, as ``resnet20`` with five blocks a stage; ``width=64`` is BatchEnsemble's ResNet-32x4.

    Args:
        num_classes: Width of the classifier; None for a body without one.
        input_shape: ``(C, H, W)`` of one image.
        width: Channels of the first stage.
    """
    return _resnet(input_shape, [width, 2 * width, 4 * width], 5, num_classes)


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each behind its norm and ReLU (He et al., ECCV 2016), with dropout before the second.

    Where the shape changes, the shortcut is a 1x1 convolution of what the first convolution reads.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, C_in, H, W)`` to ``(batch, C_out, H / stride, W / stride)``."""
        active = F.relu(self.bn1(x))
        out = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        return out + (x if self.shortcut is None else self.shortcut(active))


def wrn28_10(
    num_classes: int | None = None,
    *,
    input_shape: Shape = (3, 32, 32),
    width: int = 10,
    dropout: float = 0.0,
) -> Body:
    """Wide ResNet-28-10 (Zagoruyko and Komodakis 2016): three stages of four pre-activation blocks.

    The widths are 16, then 16, 32 and 64 times ``width``: 36,479,194 parameters with a classifier of ten classes.
    Convolutions start as N(0, 2 / fan_out).

    Args:
        num_classes: Width of the classifier; None for a body without one.
        input_shape: ``(C, H, W)`` of one image.
        width: Multiplies the channels of every stage.
        dropout: Share of the activations dropped between the two convolutions of a block.
    """
    layers: list[nn.Module] = [nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False)]
    before = 16
    for stage, channels in enumerate((16 * width, 32 * width, 64 * width)):
        for block in range(4):
            layers.append(PreActivationBlock(before, channels, 2 if stage and not block else 1, dropout))
            before = channels
    layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = Body(nn.Sequential(*layers), before, num_classes)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def without_classifier(model: nn.Module) -> nn.Module:
    """Turn a classifier such as torchvision's into a body: its last linear layer makes way for the features.

    The model is changed in place and returned, with ``num_features`` set.

    Raises:
        InputError: The network has no linear layer to take off.
    """
    if isinstance(model, Body):
        model.fc = nn.Identity()
    if isinstance(getattr(model, "num_features", None), int):
        return model
    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    if not linears:
        raise InputError(
            f"{type(model).__name__} has no linear layer to take off; set its num_features yourself."
        )
    name, last = linears[-1]
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    model.num_features = last.in_features  # pyright: ignore
    return model


def reinitialise(module: nn.Module) -> nn.Module:
    """Draw all weights anew, in place, as the layers' own ``reset_parameters`` do; returns the module."""
    for child in module.modules():
        # attention has it under a private name
        reset = getattr(child, "reset_parameters", getattr(child, "_reset_parameters", None))
        if callable(reset):
            reset()
    return module
