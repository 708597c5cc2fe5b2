"""Rank-1 products in training: what they keep for the backward pass, and what they compute again there.

Left to autograd, ``W (x * r) * s`` keeps ``x``, ``x * r`` and the product, twice the memory of the plain layer. Here
``scaled`` keeps ``x`` and the product, and ``merged``, which makes the dense weight ``M = W * (s r^T)``, keeps ``x``
alone where W learns. With a frozen W no gradient of a weight is ever computed: as ``M`` is homogeneous in every
``r_i`` and ``s_o``, their gradients are sums over what passes through anyway,

    ``dL/dr_i = sum(x_i * dL/dx_i) / r_i``  and  ``dL/ds_o = sum(y_o * dL/dy_o) / s_o``

over rows and positions, where ``y`` is the output, which the layer after it keeps as its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lifelong_ens.layers.bank import along, scale_and_shift

# of the input, of the weight, of the bias
Wanted = tuple[bool, bool, bool]
# added to r and s where gradients are divided by them, so that neither is zero; far below the resolution of what they
# are multiplied with
TINY = 1e-12


@dataclass(frozen=True)
class Dense:
    """The product of a linear layer: ``(..., in)`` times ``(out, in)``."""

    groups: int = 1
    channel_axis: int = -1

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(..., out)``."""
        return F.linear(x, weight, bias)

    def backward(self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> list[Tensor | None]:
        """The wanted gradients of the input, the weight and the bias, each in its shape."""
        rows = gradient.flatten(0, -2)
        return [
            gradient @ weight if wanted[0] else None,
            rows.t() @ x.flatten(0, -2) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        ]


@dataclass(frozen=True)
class Convolution:
    """The product of a convolution with explicit padding by zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channel_axis: int = 1

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(batch, out, ...)``."""
        return torch.convolution(x, weight, bias, *self._options)

    def backward(self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> list[Tensor | None]:
        """The wanted gradients of the input, the weight and the bias, each in its shape."""
        sizes = [len(weight)] if wanted[2] else None
        return torch.ops.aten.convolution_backward(gradient, x, weight, sizes, *self._options, wanted)

    @property
    def _options(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), self.groups


Product = Dense | Convolution


def by_group(r: Tensor, num_out: int, groups: int) -> Tensor:
    """``r`` as every output reads it: ``(1, in)``, or ``(out, in / groups)`` of a weight with groups."""
    # row o of a grouped weight reads only the input channels of its own group
    rows = r.view(groups, -1)
    return rows if groups == 1 else rows.repeat_interleave(num_out // groups, dim=0)


def outer(r: Tensor, s: Tensor, groups: int) -> Tensor:
    """``s r^T`` as a weight with so many groups has it, ``(out, in / groups)``."""
    return s.unsqueeze(1) * by_group(r, len(s), groups)


def dense_weight(weight: Tensor, r: Tensor, s: Tensor, groups: int) -> Tensor:
    """``W * (s r^T)`` in the shape of ``W``."""
    factor = outer(r, s, groups)
    return weight * factor.view(*factor.shape, *[1] * (weight.dim() - 2))


def merged(x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None, product: Product) -> Tensor:
    """The product of ``x`` with one member's dense weight ``W * (s r^T)``, and its bias, in the dtype of ``x``.

    Args:
        x: ``(batch, in, ...)``, or ``(..., in)`` of a linear layer.
        weight: The shared weight.
        r: The member's, ``(in,)``.
        s: The member's, ``(out,)``.
        bias: The member's, ``(out,)``, or None.
        product: How the layer multiplies.
    """
    result: Any = _Merged.apply(x, weight, r, s, bias, product)
    return result


def scaled(x: Tensor, weight: Tensor, r: Tensor, s: Tensor, shift: Tensor | None, product: Product) -> Tensor:
    """``W (x * r) * s``, and the bias, in the dtype of ``x``; rows of any members.

    Args:
        x: ``(batch, in, ...)``, or ``(..., in)`` of a linear layer.
        weight: The shared weight.
        r: One row for all of ``x``, or one each, shaped to broadcast to it.
        s: The same for the output.
        shift: The same, the bias, or None.
        product: How the layer multiplies.
    """
    result: Any = _Scaled.apply(x, weight, r, s, shift, product)
    return result


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None, product: Product
    ) -> Tensor:
        input_learns, weight_learns, *_ = ctx.needs_input_grad
        ctx.product, ctx.sums = product, input_learns and not weight_learns
        bias = None if bias is None else bias.to(x.dtype)
        if not ctx.sums:
            dense = dense_weight(weight, r, s, product.groups).to(x.dtype)
            ctx.save_for_backward(x, dense, r, s, weight)
            return product.forward(x, dense, bias)
        r, s = r + TINY, s + TINY
        dense = dense_weight(weight, r, s, product.groups).to(x.dtype)
        y = product.forward(x, dense)
        if bias is not None:
            ctx.save_for_backward(x, dense, r, s, y)
            return y + along(bias.unsqueeze(0), y, product.channel_axis)
        # its own output, which a norm behind it keeps anyway, is not saved the usual way: an activation in place may
        # overwrite it, which is no error here
        ctx.save_for_backward(x, dense, r, s)
        ctx.output, ctx.version = y.detach(), y._version
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        gradient = gradients[0].to(ctx.saved_tensors[0].dtype)
        return *(_by_sums if ctx.sums else _by_weight)(ctx, gradient), None


def _by_sums(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients where W is frozen and the input learns."""
    (x, dense, r, s, *kept), product, axis = ctx.saved_tensors, ctx.product, ctx.product.channel_axis
    if kept:
        (y,) = kept
    else:
        y = ctx.output if ctx.output._version == ctx.version else product.forward(x, dense)
    bias_learns = ctx.needs_input_grad[4]
    dx, _, _ = product.backward(gradient, x, dense, (True, False, False))
    dr = _sum_to_channels(x * dx, axis) / r
    ds = _sum_to_channels(y * gradient, axis) / s
    return dx, None, dr, ds, _sum_to_channels(gradient, axis) if bias_learns else None


def _by_weight(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients by that of the dense weight: where W learns, or where the input does not."""
    x, dense, r, s, weight = ctx.saved_tensors
    input_learns, weight_learns, r_learns, s_learns, bias_learns, _ = ctx.needs_input_grad
    product: Product = ctx.product
    wanted = input_learns, weight_learns or r_learns or s_learns, bias_learns
    dx, of_dense, dbias = product.backward(gradient, x, dense, wanted)
    dweight = dr = ds = None
    if of_dense is not None:
        of_dense = of_dense.to(weight.dtype)
        factor = outer(r, s, product.groups)
        if weight_learns:
            dweight = of_dense * factor.view(*factor.shape, *[1] * (weight.dim() - 2))
        of_outer = of_dense * weight
        of_outer = of_outer.flatten(2).sum(2) if weight.dim() > 2 else of_outer
        ds = (of_outer * by_group(r, len(s), product.groups)).sum(1)
        dr = (of_outer * s.unsqueeze(1)).view(product.groups, -1, of_outer.shape[1]).sum(1).flatten()
    return dx, dweight, dr, ds, None if dbias is None else dbias.to(s.dtype)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, r: Tensor, s: Tensor, shift: Tensor | None, product: Product
    ) -> Tensor:
        y = product.forward(x * r, weight.to(x.dtype))
        ctx.product = product
        ctx.shift_shape = None if shift is None else shift.shape
        ctx.save_for_backward(x, weight, r, s, y)
        return y * s if shift is None else scale_and_shift(y, s, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, r, s, y = ctx.saved_tensors
        input_learns, weight_learns, r_learns, s_learns, shift_learns, _ = ctx.needs_input_grad
        (gradient,), product = gradients, ctx.product
        dx = dweight = dr = ds = dshift = None
        if shift_learns:
            dshift = _sum_to(gradient, ctx.shift_shape)
        if s_learns:
            ds = _sum_to(gradient * y, s.shape)
        gradient = gradient * s
        if input_learns or r_learns:
            of_scaled, _, _ = product.backward(gradient, x, weight.to(x.dtype), (True, False, False))
            dr = _sum_to(of_scaled * x, r.shape) if r_learns else None
            dx = of_scaled.mul_(r) if input_learns else None
        if weight_learns:
            wanted = False, True, False
            dweight = product.backward(gradient, x * r, weight.to(x.dtype), wanted)[1].to(weight.dtype)
        return dx, dweight, dr, ds, dshift, None


def _sum_to_channels(value: Tensor, channel_axis: int) -> Tensor:
    """The sum over all axes but the channels', in float32 at least."""
    axes = [axis for axis in range(value.dim()) if axis != channel_axis % value.dim()]
    return value.sum(axes, dtype=torch.promote_types(value.dtype, torch.float32))


def _sum_to(value: Tensor, shape: torch.Size) -> Tensor:
    """Summed over the axes along which a tensor of this shape was broadcast."""
    axes = [axis for axis in range(value.dim()) if shape[axis] == 1 != value.shape[axis]]
    return value.sum(axes, keepdim=True) if axes else value
