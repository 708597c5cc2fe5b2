"""Convolutions of one, two and three dimensions with rank-1 members."""

from __future__ import annotations

from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.layers.products import Convolution, Product
from lifelong_ens.layers.rank1 import Rank1Layer, with_tensors_of, without_members


class _Rank1Conv(Rank1Layer):
    """Convolutions of any dimension: input channels scaled by ``r``, output channels by ``s``."""

    in_channels: int
    out_channels: int
    plain: type[nn.Conv1d | nn.Conv2d | nn.Conv3d]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        *,
        num_members: int,
        init: str = "random_sign",
        rank: int = 1,
        additive: int = 0,
        **conv_options: Any,
    ) -> None:
        self.plain.__init__(self, in_channels, out_channels, kernel_size, **conv_options)  # pyright: ignore
        self.add_members(num_members, init=init, rank=rank, additive=additive)

    @classmethod
    def of(cls, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, num_members: int, **options: Any) -> Self:
        """The same convolution with members, sharing its weight tensor; options as in ``add_members``."""
        new = cls.__new__(cls)
        cls.plain.__init__(new, **_conv_options(layer))  # pyright: ignore
        return with_tensors_of(new, layer, num_members, options)

    def member_sizes(self) -> tuple[int, int]:
        """``(in_channels, out_channels)``."""
        return self.in_channels, self.out_channels

    def product(self, x: Tensor) -> tuple[Product, Tensor]:
        """See ``Rank1Layer.product``."""
        layer: Any = self
        padding = layer.padding
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(layer.stride)
        return Convolution(layer.stride, padding, layer.dilation, layer.groups), x

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See ``Rank1Layer.multiply``."""
        return self._conv_forward(x, weight, bias)  # pyright: ignore

    def _row_sizes(self, x: Tensor) -> tuple[int, int]:
        layer: Any = self
        positions = 1
        for axis, size in enumerate(x.shape[2:]):
            if layer.padding != "same":
                padding = 0 if layer.padding == "valid" else layer.padding[axis]
                reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
                size = (size + 2 * padding - reach - 1) // layer.stride[axis] + 1
            positions *= size
        return x[0].numel() if len(x) else 0, positions * self.out_channels

    def export(self, member: int) -> nn.Module:
        """One member as torch's plain convolution."""
        return without_members(self.plain(**_conv_options(self)), self, member)  # pyright: ignore


class Rank1Conv1d(_Rank1Conv, nn.Conv1d):
    """``nn.Conv1d`` with rank-1 members; options are keywords beside ``num_members`` and ``init``."""

    plain = nn.Conv1d


class Rank1Conv2d(_Rank1Conv, nn.Conv2d):
    """``nn.Conv2d`` with rank-1 members; options are keywords beside ``num_members`` and ``init``."""

    plain = nn.Conv2d


class Rank1Conv3d(_Rank1Conv, nn.Conv3d):
    """``nn.Conv3d`` with rank-1 members; options are keywords beside ``num_members`` and ``init``."""

    plain = nn.Conv3d


def _conv_options(layer: Any) -> dict[str, Any]:
    """The constructor arguments of a convolution, for a copy whose tensors are put in afterwards."""
    has_bias = layer._has_bias() if isinstance(layer, Rank1Layer) else layer.bias is not None
    names = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    return {name: getattr(layer, name) for name in names} | {"bias": has_bias, "device": "meta"}
