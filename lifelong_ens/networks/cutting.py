"""Channels cut out of a plain network: what is left is a smaller dense one with the same forward code."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lifelong_ens.layers.structured import fill_layer
from lifelong_ens.networks.channels import Channels
from lifelong_ens.networks.plain import Body


def keep_channels(body: nn.Module, groups: Sequence[Channels], kept: Sequence[Tensor]) -> None:
    """Cut all other channels out of ``body``, in place: rows where they are written, columns where they are read.

    The function stays the same where these are zero wherever they are read.

    Args:
        body: A plain network.
        groups: Its channels, from ``trace_channels``.
        kept: For every group, ``(size,)`` booleans.
    """
    modules: dict[str, Any] = dict(body.named_modules())
    for group, keep in zip(groups, kept, strict=True):
        channels = keep.nonzero().squeeze(1)
        for layer in (modules[name] for name in group.writers):
            fill_layer(layer, layer.weight[channels], None if layer.bias is None else layer.bias[channels])
        for layer in (modules[name] for name in group.readers):
            columns = positions(channels, layer.weight.shape[1] // group.size)
            fill_layer(layer, layer.weight[:, columns], layer.bias)
        for norm in (modules[name] for name in group.norms):
            norm.num_features = len(channels)
            for name in ("weight", "bias", "running_mean", "running_var"):
                values = getattr(norm, name)
                if values is not None:
                    values.data = values.data[channels]


def cut_out(network: nn.Module, groups: Sequence[Channels], kept: Mapping[str, Tensor]) -> nn.Module:
    """A smaller dense copy of ``network``, with these channels alone.

    Args:
        network: A plain network.
        groups: Its channels, from ``trace_channels``.
        kept: By name of the group, ``(size,)`` booleans; a group that is not named keeps all of its channels.
    """
    small = copy.deepcopy(network)
    everything = {group.name: torch.ones(group.size, dtype=torch.bool) for group in groups}
    keep_channels(small, groups, [kept.get(name, all_of_it) for name, all_of_it in everything.items()])
    if isinstance(small, Body) and isinstance(small.fc, nn.Linear):
        small.num_features = small.fc.in_features
    return small


def positions(channels: Tensor, per_channel: int) -> Tensor:
    """Indices of the given channels in a flattened ``(channels, positions)``."""
    offsets = torch.arange(per_channel, device=channels.device)
    return (channels.unsqueeze(1) * per_channel + offsets).flatten()
