from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lifelong_ens.errors import InputError
from lifelong_ens.networks.channels import trace_channels
from lifelong_ens.networks.plain import lenet5, mlp, resnet18, vgg11_half, without_classifier


def test_a_chain_has_a_group_for_every_layer():
    groups = trace_channels(lenet5())
    assert [group.size for group in groups] == [6, 16, 120, 84]
    assert [group.readers for group in groups] == [("features.3",), ("features.7",), ("features.9",), ()]
    assert [group.features for group in groups] == [False, False, False, True]
    assert [group.name for group in trace_channels(mlp(hidden=(5, 4)))] == ["features.1", "features.3"]


def test_norms_belong_to_the_channels_that_they_normalise():
    groups = trace_channels(vgg11_half(batch_norm=True))
    assert [group.norms for group in groups[:2]] == [("features.1",), ("features.5",)]
    assert [group.normalised for group in groups[:2]] == [("features.0",), ("features.4",)]


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.one, self.sum = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.sum(self.one(self.drop(self.first(x))) + self.second(x))


def test_a_norm_of_a_sum_normalises_no_layer():
    (group,) = trace_channels(Summed())
    assert dict(zip(group.norms, group.normalised, strict=True)) == {"one": "first", "sum": None}


def test_all_that_is_added_on_a_residual_stream_is_one_group():
    groups = {group.name: group for group in trace_channels(resnet18(width=4))}
    stem = groups["features.0"]
    assert stem.writers == ("features.0", "features.3.conv2", "features.4.conv2")
    assert stem.readers == (
        "features.3.conv1",
        "features.4.conv1",
        "features.5.conv1",
        "features.5.shortcut.0",
    )
    assert groups["features.3.conv1"].readers == ("features.3.conv2",)
    assert len(groups) == 4 + 8
    assert [name for name, group in groups.items() if group.features] == ["features.9.conv2"]


def test_torchvision_networks_can_be_followed():
    body = without_classifier(torchvision.models.resnet18(weights=None))
    assert len(trace_channels(body)) == 12
    groups = trace_channels(without_classifier(torchvision.models.vgg11_bn(weights=None)))
    assert [group.size for group in groups] == [64, 128, 256, 256, 512, 512, 512, 512, 4096, 4096]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4 * 9, 6)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.linear(x.view(x.size(0), -1)).relu()


class Concatenated(Functional):
    def forward(self, x):
        x = self.conv(x)
        return torch.cat([x, x], dim=1)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.linear(x))


class OnTheMap(Functional):
    def forward(self, x):
        return self.linear(self.conv(x))


class Branching(Functional):
    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


def test_functions_and_views_are_followed():
    first, second = trace_channels(Functional())
    assert first.readers == ("linear",)
    assert second.features


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (Concatenated(), "followed through"),
        (Twice(), "linear is used twice"),
        (OnTheMap(), "through linear"),
        (Branching(), "cannot be followed"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "through 0"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)), "GroupNorm"),
        (nn.Sequential(nn.ReLU()), "no linear or convolution"),
    ],
)
def test_what_cannot_be_followed_is_named(body, words):
    with pytest.raises(InputError, match=words):
        trace_channels(body)
