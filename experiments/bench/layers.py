"""Rank-1 layers against those of other packages, which are given the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench.measuring import Call, Goal, Race
from lifelong_ens.layers.bank import Members
from lifelong_ens.layers.convolution import Rank1Conv2d
from lifelong_ens.layers.linear import Rank1Linear
from lifelong_ens.layers.rank1 import Rank1Layer

TORCH_UNCERTAINTY, TABM = "torch-uncertainty", "tabm"
NUM_MEMBERS = 4


def layers(
    device: torch.device, *, features: int = 512, channels: int = 32, rows: int = 64
) -> Iterator[Race]:
    """Forward and backward of Rank1Linear and Rank1Conv2d, against torch-uncertainty and tabm.

    Args:
        device: Where.
        features: Inputs and outputs of the linear layer.
        channels: Of the convolution, 3x3 on 16x16.
        rows: For each of four members.
    """
    linear = Rank1Linear(features, features, num_members=NUM_MEMBERS, init="gaussian", device=device)
    conv = Rank1Conv2d(channels, channels, 3, padding=1, num_members=NUM_MEMBERS, init="gaussian").to(device)
    total = NUM_MEMBERS * rows
    x = torch.randn(total, features, device=device)
    yield _race(f"Linear {features}, {NUM_MEMBERS} x {rows} rows", linear, x, tabm=True)
    maps = torch.randn(total // 4, channels, 16, 16, device=device)
    yield _race(f"Conv2d {channels}, {NUM_MEMBERS} x {rows // 4} rows", conv, maps)
    sequences = torch.randn(total // 4, 9, features, device=device)
    yield _race(f"Linear, sequences of 9, {NUM_MEMBERS} x {rows // 4}", linear, sequences, tabm=True)
    yield _race("Linear, one row, of the first member", linear, x[:1], members=0)
    yield _race("Conv2d, one row, of the first member", conv, maps[:1], members=0)
    odd = total - NUM_MEMBERS + 2
    ids = (torch.arange(odd, device=device) // (odd // NUM_MEMBERS)).clamp(max=NUM_MEMBERS - 1)
    yield _race(f"Linear, {odd} rows, two more for the last member", linear, x[:odd], members=ids)


def _race(
    case: str, layer: Rank1Linear | Rank1Conv2d, x: Tensor, members: Members = None, tabm: bool = False
) -> Race:
    """Ours against each; where rows are not blocks of one length, ``members`` says whose they are."""
    # tabm has the members on an axis of their own, and so every answer is seen that way
    view = _in_blocks if tabm else _as_it_is

    def ours() -> Call:
        run = _forward_backward(layer, x, view)

        def call() -> Tensor:
            with layer.selection.of(members):
                return run()

        return call

    contestants: dict[str, Callable[[], Call]] = {
        type(layer).__name__: ours,
        TORCH_UNCERTAINTY: lambda: _forward_backward(_torch_uncertainty(layer), x, view),
    }
    if tabm:
        blocks = _in_blocks(x).transpose(0, 1).contiguous()
        contestants[TABM] = lambda: _forward_backward(_tabm(layer), blocks, lambda out: out.transpose(0, 1))
    peers = list(contestants)[1:]
    return Race(case, contestants, tuple(Goal(peer, "<=", 1.0, same_answer=True) for peer in peers))


def _as_it_is(out: Tensor) -> Tensor:
    return out


def _in_blocks(out: Tensor) -> Tensor:
    """``(members * rows, ...)`` as ``(members, rows, ...)``."""
    return out.unflatten(0, (NUM_MEMBERS, -1))


def _forward_backward(module: nn.Module, x: Tensor, view: Callable[[Tensor], Tensor]) -> Call:
    """An answer and the gradients of all that it was made of."""
    x = x.detach().clone().requires_grad_(True)
    wanted = [x, *module.parameters()]

    def call() -> Tensor:
        out = module(x)
        torch.autograd.grad(out, wanted, torch.ones_like(out))
        return view(out.detach())

    return call


def _torch_uncertainty(layer: Rank1Linear | Rank1Conv2d) -> nn.Module:
    from torch_uncertainty.layers.batch_ensemble import BatchConv2d, BatchLinear  # pyright: ignore

    if isinstance(layer, Rank1Linear):
        peer = BatchLinear(layer.in_features, layer.out_features, NUM_MEMBERS)
        inner = peer.linear
    else:
        peer = BatchConv2d(layer.in_channels, layer.out_channels, 3, NUM_MEMBERS, padding=1)
        inner = peer.conv
    return _filled(peer, layer, inner.weight, peer.r_group, peer.s_group)


def _tabm(layer: Rank1Layer) -> nn.Module:
    from tabm import LinearBatchEnsemble  # pyright: ignore

    size = layer.member_sizes()
    peer = LinearBatchEnsemble(*size, k=NUM_MEMBERS, scaling_init="random-signs")
    return _filled(peer, layer, peer.weight, peer.r, peer.s)


@torch.no_grad()
def _filled(peer: Any, layer: Rank1Layer, weight: Tensor, r: Tensor, s: Tensor) -> nn.Module:
    """The peer's layer with the numbers of ours, on its device."""
    own = layer.get_parameter("weight")
    pairs = [(weight, own), (r, layer.r.table()), (s, layer.s.table())]
    if layer.private_bias is not None:
        pairs.append((peer.bias, layer.private_bias.table()))
    for target, source in pairs:
        target.copy_(source)
    return peer.to(own.device)
