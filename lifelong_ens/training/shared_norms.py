"""Batch normalisation with the statistics of a mini-batch whose rows are on several devices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lifelong_ens.training.devices import Devices


class SharedNorms(TorchFunctionMode):
    """Inside, ``F.batch_norm`` in training normalises by the rows of all devices, and remembers their statistics.

    Every batch norm calls that function: torch's, those with members, anybody's. ``nn.SyncBatchNorm`` does the same on
    CUDA alone, and takes the place of torch's own modules only.

    Args:
        devices: Which have the rows; all of them run the same norms in the same order, forward and backward.
    """

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Everything but a batch norm goes on to torch."""
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        y, mean, var, count = _Normalise.apply(x, weight, bias, eps, self.devices)  # pyright: ignore
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
        return y


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over all rows of all devices, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, devices: Devices
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        exact = torch.promote_types(x.dtype, torch.float32)
        var, mean = torch.var_mean(x.to(exact), axes, correction=0)
        rows = mean.new_full((1,), x.numel() // x.shape[1])
        # means and variances, not sums of squares, whose difference would lose the digits of a small variance
        parts = devices.each(torch.cat([mean, var, rows])).double()
        means, variances, counts = parts[:, : len(mean)], parts[:, len(mean) : -1], parts[:, -1:]
        count = counts.sum()
        if count <= 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.size()}"
            )
        mean = (means * counts).sum(dim=0) / count
        var = ((variances + (means - mean).square()) * counts).sum(dim=0) / count
        mean, var, count = mean.to(exact), var.to(exact), count.to(exact)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), count)
        ctx.devices, ctx.axes = devices, axes
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        gradient = gradients[0].to(mean.dtype)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        centred = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        of_bias, of_weight = gradient.sum(ctx.axes), (gradient * centred).sum(ctx.axes)
        sums = ctx.devices.total(torch.cat([of_bias, of_weight])) / count
        first, second = (one.view(shape) for one in sums.chunk(2))
        factor = scale if weight is None else scale * weight
        of_x = (gradient - first - centred * second) * factor.view(shape)
        needs = ctx.needs_input_grad
        kind = None if weight is None else weight.dtype
        return (
            of_x.to(x.dtype) if needs[0] else None,
            of_weight.to(kind) if needs[1] else None,
            of_bias.to(kind) if needs[2] else None,
            None,
            None,
        )
