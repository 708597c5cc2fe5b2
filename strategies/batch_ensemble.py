"""BatchEnsemble for lifelong learning (Wen, Tran and Ba, ICLR 2020, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from avalanche.core import SupervisedPlugin
from torch import nn

from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork, Init, NormPolicy
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy


def batch_ensemble_lifelong(
    body: nn.Module,
    *,
    init: Init = "random_sign",
    norm: NormPolicy = "statistics_only",
    bias: Literal["per_member", "shared"] = "per_member",
    members_per_task: int = 1,
    first_task: Literal["member", "shared"] = "member",
    fast_learning_rate: float | None = None,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """Shared weights learnt on the first task, rank-1 fast weights and a head for every task.

    Args:
        body: The network; a classifier's last linear layer is taken off.
        init: How a task's fast weights start: random_sign (the paper), gaussian, ones, or previous (the last task's).
        norm: What norms keep per task: statistics_only, per_member (affine too) or shared_frozen (nothing).
        bias: One per_member, or the first task's, shared.
        members_per_task: Members a task holds; more than one is a small ensemble that reports uncertainty.
        first_task: member gives the first task fast weights too; shared makes it the shared network itself.
        fast_learning_rate: Of the fast weights; the common learning rate if not given.
        fit: How each task is trained.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    network = BatchEnsembleNetwork(
        body, init=init, norm=norm, bias=bias, members_per_task=members_per_task, first_task=first_task
    )
    fast: dict[str, Any] = {"weight_decay": 0.0}
    if fast_learning_rate is not None:
        fast["lr"] = fast_learning_rate
    return Strategy(
        network=network, fit=fit, seed=seed, device=device, overrides={"fast_weights": fast}, plugins=plugins
    )
