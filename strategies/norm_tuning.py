"""BN-Tuned: norms and a head of its own for every task, the baseline of BatchEnsemble's Split-ImageNet experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from avalanche.core import SupervisedPlugin
from torch import nn

from lifelong_ens.errors import UnfitNetworkError
from lifelong_ens.networks.layout import Layout
from lifelong_ens.networks.member_body import MemberBody, member_norms
from lifelong_ens.networks.plain import without_classifier
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy

Start = Literal["first", "previous"]


def bn_tuned(
    body: nn.Module,
    *,
    start: Start = "first",
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """Weights learnt on the first task and then frozen; norms (affine and statistics) and a head for every task.

    Args:
        body: The network, which has norms; a classifier's last linear layer is taken off.
        start: A new task's norms start as those of the first task, or of the previous one.
        fit: How each task is trained.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    network = NormTunedNetwork(body, start=start)
    return Strategy(network=network, fit=fit, seed=seed, device=device, plugins=plugins)


class NormTunedNetwork(MemberBody):
    """Task t uses the shared weights with norms ``gamma_t, beta_t`` and running statistics of its own.

    Source: Wen, Tran and Ba, ICLR 2020, section 4.1, the baseline "BN-Tuned". The paper widens the network until its
    parameters match BatchEnsemble's, by a rule that it does not give; here the width is the caller's. Batch norms have
    affine numbers and statistics per task, layer and group norms affine numbers; all else, biases of layers included,
    stays as the first task left it.

    Args:
        body: A network with norms.
        start: Where a new task's norms start.

    Raises:
        UnfitNetworkError: The network has no norm that a task could have of its own.
    """

    layout = Layout("norms", "per_member")

    def __init__(self, body: nn.Module, *, start: Start = "first") -> None:
        members, selection, has_norms = member_norms(without_classifier(body), "per_member")
        if not has_norms:
            raise UnfitNetworkError(
                f"bn_tuned trains norms, and {type(body).__name__} has no batch, layer or group norm: "
                "use a network with norms, such as --network resnet18."
            )
        super().__init__(members, selection, init="previous" if start == "previous" else "ones")
