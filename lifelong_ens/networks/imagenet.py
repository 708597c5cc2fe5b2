"""Networks for images of 224x224, as torchvision builds them."""

from __future__ import annotations

from torch import nn
from torchvision import models

from lifelong_ens.networks.plain import Shape, without_classifier


def resnet50(num_classes: int | None = None, *, input_shape: Shape = (3, 224, 224)) -> nn.Module:
    """ResNet-50 (He et al. 2016), torchvision's, which strides in the 3x3 convolutions: 23,454,912 of their weights.

    Args:
        num_classes: Width of the classifier; None for a body without one.
        input_shape: ``(C, H, W)`` of one image.
    """
    network = models.resnet50(num_classes=num_classes or 1)
    if input_shape[0] != 3:
        network.conv1 = nn.Conv2d(input_shape[0], 64, 7, stride=2, padding=3, bias=False)
    return without_classifier(network) if num_classes is None else network
