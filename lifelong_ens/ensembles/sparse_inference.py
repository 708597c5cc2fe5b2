"""Sparse networks that answer faster on a CPU, where their linear layers are sparse enough."""

from __future__ import annotations

import copy
import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn

from lifelong_ens.convert import replace_modules
from lifelong_ens.errors import InputError

Network = TypeVar("Network", bound=nn.Module)


class CSRLinear(nn.Module):
    """A linear layer for inference whose weight is stored as compressed sparse rows.

    Args:
        layer: The layer with its zeros; on the CPU.
    """

    csr: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        with warnings.catch_warnings():
            # torch calls the layout a beta at its first use
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self.register_buffer("csr", weight.to_sparse_csr())
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        columns = x.flatten(0, -2).t() if x.dim() > 1 else x.unsqueeze(1)
        out = torch.addmm(self.bias.unsqueeze(1).expand(-1, columns.shape[1]), self.csr, columns)
        return out.t().reshape(*x.shape[:-1], len(self.bias))


def export_csr(network: Network, max_density: float = 0.2) -> Network:
    """A copy of a network for inference on a CPU, its sparse linear layers as ``CSRLinear``; equal to 1e-5.

    It pays for batches, not for single inputs. A square layer of 256, 1,024 or 4,096 units, on one thread of an EPYC,
    takes for a batch of 64 about 0.9, 0.7 and 0.7 of the dense layer's time at density 0.2, 0.6, 0.4 and 0.4 of it at
    0.1, and more than all of it at 0.3; for one input at density 0.2 it takes three to four times as long. Convolutions
    stay dense. The copy is not for training or saving: save the ensemble, and export what was loaded.

    Args:
        network: Any network or ensemble with zeros in its weights; it is not changed.
        max_density: Layers with a larger share of non-zero weights stay dense.

    Raises:
        InputError: No linear layer is that sparse.
    """
    out = copy.deepcopy(network).cpu().eval().requires_grad_(False)
    sparse: dict[nn.Module, nn.Module] = {
        layer: CSRLinear(layer)
        for layer in out.modules()
        if type(layer) is nn.Linear
        and int(torch.count_nonzero(layer.weight)) <= max_density * layer.weight.numel()
    }
    if not sparse:
        raise InputError(
            f"no linear layer has a density of at most {max_density:g}: nothing to gain from CSR."
        )
    return replace_modules(out, sparse)  # pyright: ignore
