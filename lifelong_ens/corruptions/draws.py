"""Random numbers from a generator: the same on every device, for they are drawn on the generator's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def normal(shape: Sequence[int], generator: Generator, like: Tensor) -> Tensor:
    """Standard normal numbers of ``shape``, with the device and the dtype of ``like``."""
    return torch.randn(shape, generator=generator, device=generator.device).to(like)


def uniform(
    shape: Sequence[int], generator: Generator, like: Tensor, low: float = 0, high: float = 1
) -> Tensor:
    """Numbers of ``shape``, uniform in [low, high), with the device and the dtype of ``like``."""
    return torch.rand(shape, generator=generator, device=generator.device).mul(high - low).add(low).to(like)


def integers(shape: Sequence[int], generator: Generator, like: Tensor, low: int, high: int) -> Tensor:
    """Integers of ``shape``, uniform in low, ..., high - 1, on the device of ``like``."""
    return torch.randint(low, high, tuple(shape), generator=generator, device=generator.device).to(
        like.device
    )
