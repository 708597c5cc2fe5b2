"""Boolean masks as bits, eight to a byte: what a mask really costs when it is stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """Booleans ``(..., n)`` as bytes ``(..., ceil(n / 8))``, uint8, the first in the lowest bit."""
    length = mask.shape[-1]
    padded = F.pad(mask.to(torch.uint8), (0, -length % 8)).unflatten(-1, (-1, 8))
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded << places).sum(dim=-1, dtype=torch.uint8)


def unpack(bits: Tensor, length: int) -> Tensor:
    """The first ``length`` booleans of packed bytes: ``(..., ceil(length / 8))`` to ``(..., length)``."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> places) & 1).flatten(-2)[..., :length].bool()


def pack_zeros(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor as the bits of where it is not zero, and its values there; exact, negative zeros included."""
    flat = tensor.detach().flatten()
    kept = (flat != 0) | flat.signbit()
    return pack(kept), flat[kept]


def unpack_zeros(bits: Tensor, values: Tensor, shape: torch.Size | list[int]) -> Tensor:
    """What ``pack_zeros`` took apart, in its shape."""
    flat = values.new_zeros(torch.Size(shape).numel())
    flat[unpack(bits, len(flat))] = values
    return flat.view(shape)
