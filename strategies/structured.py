"""Structured ensembles for lifelong learning (Pomponi, Scardapane and Uncini, Neural Networks 144, 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal

import torch
from avalanche.benchmarks import CLExperience
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from lifelong_ens.errors import InputError
from lifelong_ens.networks.structured import StructuredNetwork, choose
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.loop import Optimisation
from strategies.base import Strategy
from strategies.loader import BatchLoader


def structured_ensemble(
    body: nn.Module,
    *,
    quantile: float = 0.5,
    scope: Literal["local", "global"] = "local",
    pruning: Literal["hard", "soft"] = "hard",
    mask_epochs: int = 10,
    mask_learning_rate: float = 0.001,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """One network whose units are given out: a task takes the free ones that matter most to it and freezes them.

    Args:
        body: The network; a classifier's last linear layer is taken off.
        quantile: Share of the free units that a task leaves free, in [0, 1); the paper's p.
        scope: Compare units within their layer, local, or over all layers, global.
        pruning: hard compares free units with each other, soft with all: fewer new units where old ones matter.
        mask_epochs: Epochs in which a task learns how much each unit matters, before it is trained.
        mask_learning_rate: Of Adam in these epochs.
        fit: How each task is trained afterwards.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    if not 0 <= quantile < 1:
        raise InputError(f"quantile is in [0, 1), not {quantile}: a task takes the share that is left.")
    if mask_epochs < 0 or mask_learning_rate <= 0:
        raise InputError(
            f"mask_epochs is at least 0 and mask_learning_rate above 0, not {mask_epochs} and {mask_learning_rate}."
        )
    choice = {"quantile": quantile, "scope": scope, "pruning": pruning}
    return StructuredEnsemble(
        network=StructuredNetwork(body),
        choice=choice,
        mask_epochs=mask_epochs,
        mask_learning_rate=mask_learning_rate,
        fit=fit,
        seed=seed,
        device=device,
        plugins=plugins,
    )


class StructuredEnsemble(Strategy):
    """Learns the scales of a task's units, gives it the most important free ones, then trains these.

    Source: as in ``StructuredNetwork``. Scales start at N(0, 1) and are trained by Adam against the random, untrained
    head on the whole network, units of earlier tasks included. The importance of a unit is ``|dL / ds|``, the
    gradient summed over a batch before its absolute value is taken, averaged over the batches of one more pass.

    Args:
        network: What is trained.
        choice: Options of ``choose``.
        mask_epochs: Epochs in which the scales are learnt.
        mask_learning_rate: Of Adam in these epochs.
        options: As in ``Strategy``.
    """

    network: StructuredNetwork

    def __init__(
        self,
        *,
        network: StructuredNetwork,
        choice: Mapping[str, Any],
        mask_epochs: int,
        mask_learning_rate: float,
        **options: Any,
    ) -> None:
        super().__init__(network=network, **options)
        self.choice, self.mask_epochs = dict(choice), mask_epochs
        self.mask_fit = replace(
            self.fit,
            optimizer="adam",
            learning_rate=mask_learning_rate,
            weight_decay=0.0,
            schedule="constant",
            warmup_epochs=0.0,
            clip_norm=None,
        )

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """Learn the scales, choose the task's units, train them."""
        network = self.network
        scales = network.start_scales()
        groups = [{"params": list(scales.values())}]
        self.optimisation = Optimisation(groups, self.mask_fit, len(self.dataloader), self.mask_epochs)  # pyright: ignore
        self.optimizer = self.optimisation.optimizer
        self.meter.new_phase()
        for _ in range(self.mask_epochs):
            self.training_epoch()
        importance = self.importance(scales)
        free = {name: layer.free_units(network.num_tasks - 1) for name, layer in network.layers()}
        network.choose_units(choose(importance, free, **self.choice))
        self.start_phase()
        super().fit_task(validation)

    def importance(self, scales: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """``|dL / ds|`` of every unit by layer, ``(units,)``, averaged over the batches of one pass."""
        loader = self.dataloader
        self._task_label = loader.task_label if isinstance(loader, BatchLoader) else None
        totals = {name: torch.zeros_like(scale) for name, scale in scales.items()}
        batches_seen = 0
        with closing(self.counted(loader)) as batches:
            for batch in batches:
                gradients = torch.autograd.grad(
                    self._loss_of(batch), list(scales.values()), materialize_grads=True
                )
                for total, gradient in zip(totals.values(), gradients, strict=True):
                    total += gradient.abs()
                batches_seen += 1
        return {name: total.detach() / max(batches_seen, 1) for name, total in totals.items()}
