from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    """Give every tensor of a network, norms and statistics included, numbers that no error can hide behind."""

    def fill(module: nn.Module, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if not tensor.is_floating_point():
                    continue
                if tensor.dim() > 1 and not name.endswith(("active", "committed")):
                    tensor.normal_(std=tensor[0].numel() ** -0.5)
                elif "var" in name:
                    tensor.uniform_(0.5, 1.5)
                elif name.endswith(("bias", "running_mean")) or "running_mean" in name or "bias" in name:
                    tensor.normal_(std=0.3)
                else:
                    tensor.normal_(1.0, 0.3)
        return module

    return fill
