"""Structured ensembles for lifelong learning (Pomponi, Scardapane and Uncini, Neural Networks 144, 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import Any, Literal

import torch
from avalanche.benchmarks import CLExperience
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from lifelong_ens.errors import InputError, UnfitNetworkError
from lifelong_ens.networks.choosing import choose, divergence, mean_importance
from lifelong_ens.networks.structured import StructuredNetwork
from lifelong_ens.training.devices import Devices
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.loop import Optimisation
from lifelong_ens.training.losses import member_loss
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
    members_per_task: int = 1,
    diversity: float = 0.01,
    grow: float = 0.0,
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
        members_per_task: How many members a task holds, each with a choice of units: a small ensemble.
        diversity: Weight of the term that keeps their scales apart while they choose.
        grow: Widen layers until a task finds this share of their first units free, such as 0.25; 0 for never.
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
    if diversity < 0:
        raise InputError(f"diversity is at least 0, not {diversity}.")
    choice = {"quantile": quantile, "scope": scope, "pruning": pruning}
    return StructuredEnsemble(
        network=StructuredNetwork(body, members_per_task=members_per_task, grow=grow),
        choice=choice,
        mask_epochs=mask_epochs,
        mask_learning_rate=mask_learning_rate,
        diversity=diversity,
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

    With several members, as in the authors' code StructuredEnsemble: a batch is split over their scales while these
    are trained, with ``diversity / divergence`` added to the loss; in the pass for importance every member sees every
    image, and the loss is that of their mean logits. Then members learn together, each from the whole batch, on the
    mean of their losses: a row that one member alone has chosen feels its share of it, and wants more epochs.

    Args:
        network: What is trained.
        choice: Options of ``choose``.
        mask_epochs: Epochs in which the scales are learnt.
        mask_learning_rate: Of Adam in these epochs.
        diversity: Weight of the term that keeps members' scales apart.
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
        diversity: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(network=network, **options)
        self.choice, self.mask_epochs, self.diversity = dict(choice), mask_epochs, diversity
        self.mask_fit = self.fit.for_scales(mask_learning_rate)
        # scales in training, between which a batch is split
        self._split: list[nn.Parameter] = []

    def steps_for(self, images: int, task: int = 0) -> int:
        """See ``Strategy.steps_for``; with the epochs of the scales and the pass for importance."""
        return super().steps_for(images, task) + math.ceil(images / self.fit.batch_size) * (
            self.mask_epochs + 1
        )

    def share_with(self, devices: Devices) -> None:
        """See ``Strategy.share_with``."""
        if devices.count > 1 and self.network.members_per_task > 1:
            raise UnfitNetworkError(
                "structured_ensemble with members_per_task above 1 does not run on several devices yet: which member "
                "learns its scales from a row hangs on the row's place in the mini-batch; run it on one."
            )
        super().share_with(devices)

    def grows_by_learning(self) -> str | None:
        """See ``Strategy.grows_by_learning``."""
        return "layers are widened by what tasks leave free" if self.network.grow else None

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """Learn the scales, choose the task's units, train them."""
        network = self.network
        scales = network.start_scales()
        groups = [{"params": list(scales.values())}]
        steps = len(self.dataloader)  # pyright: ignore
        self.optimisation = Optimisation(groups, self.mask_fit, steps, self.mask_epochs, sharing=self.sharing)
        self.optimizer = self.optimisation.optimizer
        self.meter.new_phase()
        self._split = list(scales.values()) if network.members_per_task > 1 else []
        try:
            for _ in range(self.mask_epochs):
                self.training_epoch()
        finally:
            self._split = []
        importance = self.importance(scales)
        free = {name: layer.free_units(network.num_tasks - 1) for name, layer in network.layers()}
        chosen = [
            choose({name: rows[member] for name, rows in importance.items()}, free, **self.choice)
            for member in range(network.members_per_task)
        ]
        network.choose_units({name: torch.stack([units[name] for units in chosen]) for name in free})
        self.start_phase()
        super().fit_task(validation)

    def importance(self, scales: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """``|dL / ds|`` of every unit by layer, ``(members, units)``, averaged over the batches of one pass."""
        loader, sharing = self.dataloader, self.sharing
        self._task_label = loader.task_label if isinstance(loader, BatchLoader) else None

        def losses() -> Iterator[Tensor]:
            with closing(self.counted(loader)) as batches:
                for batch in batches:
                    self.mbatch = batch
                    with self.optimisation.precision(self.device):
                        logits = self._logits(batch[0])
                        mean = logits if logits.dim() == 2 else logits.mean(dim=0)
                        loss = member_loss(mean, batch[1])
                    yield loss if sharing is None else loss * sharing.weight

        with nullcontext() if sharing is None else sharing.undivided():
            return mean_importance(losses(), scales, self.devices.total)

    def penalty(self) -> Tensor | None:
        """The term for diversity, while members' scales are trained."""
        return self.diversity / (divergence(self._split).abs() + 1e-12) if self._split else None

    def _logits(self, x: Tensor) -> Tensor:
        if not self._split:
            return super()._logits(x)
        return self.network.split_logits(x, self.network.num_tasks - 1)
