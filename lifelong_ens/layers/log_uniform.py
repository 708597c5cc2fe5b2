"""A distribution over hyper-parameters whose bounds are learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LogUniform(nn.Module):
    """Independent log-uniform distributions with learned bounds, one for each member and hyper-parameter.

    Source: Wenzel et al., NeurIPS 2020, section 4 and appendix: ``q(lambda) = LogUniform(lambda; a, b)``, with
    ``lambda = exp((1 - u) log a + u log b)``, ``u ~ U(0, 1)``. Bounds start at the ends of the allowed range.

    Attributes:
        log_low: ``log a``, ``(members, hyper-parameters)``.
        log_high: ``log b``, of the same shape.
        log_min: Logarithm of the smallest allowed value, ``(hyper-parameters,)``.
        log_max: Logarithm of the largest.

    Args:
        num_members: How many members.
        low: Smallest allowed value of each hyper-parameter, above 0, ``(hyper-parameters,)``.
        high: Largest allowed value of each, above ``low``.
    """

    component = "bounds"
    log_min: Tensor
    log_max: Tensor

    def __init__(self, num_members: int, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("log_min", low.log())
        self.register_buffer("log_max", high.log())
        self.log_low = nn.Parameter(self.log_min.repeat(num_members, 1))
        self.log_high = nn.Parameter(self.log_max.repeat(num_members, 1))

    def extra_repr(self) -> str:
        """The part of ``repr`` between the brackets."""
        return "{} x {}".format(*self.log_low.shape)

    def sample(self, num_examples: int) -> Tensor:
        """Values for every member and example, ``(members, examples, hyper-parameters)``.

        Gradients reach the bounds: ``d lambda / d log a = (1 - u) lambda`` and ``d lambda / d log b = u lambda``.
        """
        low, high = self.log_low.unsqueeze(1), self.log_high.unsqueeze(1)
        shape = len(low), num_examples, low.shape[-1]
        u = torch.rand(shape, dtype=low.dtype, device=low.device)
        return torch.exp((1 - u) * low + u * high)

    def mean(self) -> Tensor:
        """``(b - a) / (log b - log a)``, ``(members, hyper-parameters)``."""
        width = self.log_high - self.log_low
        return self.log_low.exp() * torch.expm1(width) / width

    def entropy(self) -> Tensor:
        """``(log a + log b) / 2 + log(log b - log a)``, nats, ``(members, hyper-parameters)``."""
        return (self.log_low + self.log_high) / 2 + (self.log_high - self.log_low).log()

    def scaled(self, values: Tensor) -> Tensor:
        """Logarithms of values ``(..., hyper-parameters)``, 0 at the smallest that is allowed and 1 at the largest."""
        return (values.log() - self.log_min) / (self.log_max - self.log_min)

    @torch.no_grad()
    def project(self) -> None:
        """Bring the bounds back into the allowed range and into their order, in place."""
        least = 0.5e-6 * (self.log_max - self.log_min)
        self.log_low.copy_(self.log_low.clamp(self.log_min, self.log_max - 2 * least))
        self.log_high.copy_(self.log_high.clamp(self.log_low + least, self.log_max))
