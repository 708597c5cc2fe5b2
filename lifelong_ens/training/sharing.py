"""The rows of a step, shared by devices and computed in parts, so that the step is that of the whole mini-batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lifelong_ens.training.data import channels_last
from lifelong_ens.training.devices import Devices
from lifelong_ens.training.shared_norms import SharedNorms


class Sharing:
    """Takes mini-batches apart, and puts losses and gradients together again.

    Every device draws the same mini-batch and computes some of its rows, one part after the other. A loss is a mean
    over rows: times ``weight``, those of all parts and devices sum to that of the mini-batch, and so do the gradients.
    A part of fewer rows than devices is computed whole by each.

    Two devices end where one does, after ten steps of ResNet-20 or ResNet-18 (width 20) on 32 images each: weights and
    statistics differ by at most 3e-14 in float64. In float32 MLPs differ by 1e-7; in the ResNets a ReLU that rounding
    turns over makes 1e-2 of 1e-7 within ten steps, as noise of one rounding in the initial weights does on one device.

    Attributes:
        weight: What the loss of the present rows counts in the step's.
        rows: How many rows all devices together compute of the present part.
        starts: Whether the present part is the first of its step.
        ends: Whether it is the last: behind it comes the step.

    Args:
        devices: That share the rows.
        parts: In how many parts a step is computed.
    """

    def __init__(self, devices: Devices, parts: int = 1) -> None:
        self.devices, self.parts = devices, parts
        self.weight, self.rows = 1.0, 0
        self.starts = self.ends = True
        self._apart = False
        self._losses: list[Tensor] = []

    def portions(self, batches: Iterable[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
        """Of every mini-batch what this device computes, part by part."""
        self._losses = []
        for batch in batches:
            rows = len(batch[1])
            # every part has every so manieth row: remembered ones are often at the end of a mini-batch
            parts = min(self.parts, rows)
            for index in range(parts):
                part = range(index, rows, parts)
                chosen = self.take(len(part), rows)
                self.starts, self.ends = index == 0, index == parts - 1
                mine = part[chosen]
                yield [channels_last(one[mine.start : mine.stop : mine.step].clone()) for one in batch]

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Steps in one part inside."""
        parts, self.parts = self.parts, 1
        try:
            yield
        finally:
            self.parts = parts

    def take(self, rows: int, of: int | None = None) -> slice:
        """Which of so many rows are computed here now; ``weight`` and ``rows`` are theirs from here on.

        Args:
            rows: How many are shared.
            of: How many the mean is over that they are part of; themselves if not given.
        """
        here, self.rows = self.devices.computed(rows)
        self.weight = here / self.rows * (rows / (of or rows))
        self._apart = self.rows == rows and self.devices.count > 1
        return self.devices.own(rows)

    def forward(self, precision: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
        """The context of a forward pass of the present rows."""
        if not self._apart:
            return precision
        both = ExitStack()
        both.enter_context(precision)
        both.enter_context(SharedNorms(self.devices))
        return both

    def weighed(self, loss: Tensor) -> Tensor:
        """What the loss of the present rows adds to that of the step; kept for ``step_losses``."""
        loss = loss * self.weight
        if self.starts:
            self._losses.append(loss.detach())
        else:
            self._losses[-1] = self._losses[-1] + loss.detach()
        return loss

    def step_losses(self) -> list[Tensor]:
        """The loss of every step since the portions began, over all devices."""
        losses, self._losses = self._losses, []
        return list(self.devices.total(torch.stack(losses)).unbind()) if losses else []

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give every device the sum of all devices' gradients; a parameter without one in all of them keeps none."""
        if self.devices.count == 1:
            return
        for kind in dict.fromkeys(parameter.dtype for parameter in parameters):
            self._sum([parameter for parameter in parameters if parameter.dtype == kind])

    @torch.no_grad()
    def _sum(self, parameters: Sequence[Tensor]) -> None:
        """One sum of all gradients, with a number for each that says how many devices have it."""
        gradients = [parameter.grad for parameter in parameters]
        have = [float(gradient is not None) for gradient in gradients]
        parts = [
            (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
        whole = self.devices.total(torch.cat([*parts, parts[0].new_tensor(have)]))
        *sums, had = whole.split([*(parameter.numel() for parameter in parameters), len(parameters)])
        for parameter, gradient, one, present in zip(parameters, gradients, sums, had.tolist(), strict=True):
            if gradient is not None:
                gradient.copy_(one.view_as(gradient))
            elif present:
                parameter.grad = one.view_as(parameter).clone()
