"""What every method is held against: plain fine-tuning, a network per task, and all tasks at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from avalanche.core import SupervisedPlugin
from torch import nn

from lifelong_ens.networks.task import Independent, MultiHead
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy


def finetune(
    body: nn.Module,
    *,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """Vanilla: one network with a head per task, trained on task after task; all costs are relative to it."""
    return Strategy(network=MultiHead(body), fit=fit, seed=seed, device=device, plugins=plugins)


def independent(
    body: nn.Module,
    *,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """A network of its own for every task: nothing shared, nothing forgotten."""
    return Strategy(network=Independent(body), fit=fit, seed=seed, device=device, plugins=plugins)


def joint(
    body: nn.Module,
    *,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """One network with a head per task, trained on all tasks together: an upper bound, not lifelong."""
    return Strategy(network=MultiHead(body), fit=fit, seed=seed, device=device, joint=True, plugins=plugins)
