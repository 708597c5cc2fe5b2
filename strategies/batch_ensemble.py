"""BatchEnsemble for lifelong learning (Wen, Tran and Ba, ICLR 2020, section 3.1)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from avalanche.benchmarks import CLExperience
from avalanche.core import SupervisedPlugin
from torch import nn

from lifelong_ens.errors import InputError
from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork, Init, NormPolicy, TrainOn
from lifelong_ens.networks.plain import without_classifier
from lifelong_ens.networks.weights import load_weights
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy
from strategies.fittest import fittest_task

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"init": "random_sign", "rank": 1, "fast_learning_rate": None},
    "accurate": {"init": "ones", "rank": 2, "fast_learning_rate": 0.05},
}


def batch_ensemble_lifelong(  # noqa: PLR0913 the method has these options
    body: nn.Module,
    *,
    preset: Literal["paper", "accurate"] = "paper",
    init: Init | None = None,
    norm: NormPolicy = "statistics_only",
    bias: Literal["per_member", "shared"] = "per_member",
    members_per_task: int = 1,
    first_task: Literal["member", "shared"] = "member",
    train_on: TrainOn = "first",
    weights: str | None = None,
    rank: int | None = None,
    additive: int = 0,
    first_epochs: int | None = None,
    fast_learning_rate: float | None = None,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """Shared weights learnt on the first task, rank-1 fast weights and a head for every task.

    Args:
        body: The network; a classifier's last linear layer is taken off.
        preset: paper (rank 1 from random signs, one learning rate), or accurate (rank 2 from ones, fast weights at
            0.05), which closes much of the gap to a network per task at 1.25 times the memory of one LeNet-5.
        init: How a task's fast weights start: random_sign (preset paper), gaussian, ones (preset accurate), previous
            (copies of the last task's, biases and norms too), or fittest (of the task that tells the new classes apart
            best).
        norm: What norms keep per task: statistics_only, per_member (affine too) or shared_frozen (nothing).
        bias: One per_member, or the first task's, shared.
        members_per_task: Members a task holds; more than one is a small ensemble that reports uncertainty.
        first_task: member gives the first task fast weights too; shared makes it the shared network itself.
        train_on: The shared weights are learnt on the first task, or are pretrained: frozen from the start.
        weights: File of a state_dict for pretrained, .safetensors or torch's .pth; if not given, the body's own.
        rank: Pairs of fast weights that scale each weight; preset paper 1, accurate 2.
        additive: Pairs whose products are added to each weight, as in LoRA.
        first_epochs: Epochs of the first task, which trains the shared weights; as many as later ones if not given.
        fast_learning_rate: Of the fast weights; preset paper the common learning rate, accurate 0.05.
        fit: How each task is trained.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    if preset not in PRESETS:
        raise InputError(f"preset is {' or '.join(PRESETS)}, not {preset}.")
    given = {"init": init, "rank": rank, "fast_learning_rate": fast_learning_rate}
    chosen = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
    fast_learning_rate = chosen["fast_learning_rate"]
    for name, value in (("first_epochs", first_epochs), ("fast_learning_rate", fast_learning_rate)):
        if value is not None and value <= 0:
            raise InputError(f"{name} is above 0, not {value}.")
    origin = None
    if weights is not None:
        if train_on != "pretrained":
            raise InputError(
                "weights are for train_on=pretrained; the first task would train over them. Add --train_on pretrained."
            )
        body = without_classifier(copy.deepcopy(body))
        origin = f"shared weights from {Path(weights).name}, sha256 {load_weights(body, weights)}"
    network = BatchEnsembleNetwork(
        body,
        init=chosen["init"],
        norm=norm,
        bias=bias,
        members_per_task=members_per_task,
        first_task=first_task,
        train_on=train_on,
        rank=chosen["rank"],
        additive=additive,
        origin=origin,
    )
    fast: dict[str, Any] = {"weight_decay": 0.0}
    if fast_learning_rate is not None:
        fast["lr"] = fast_learning_rate
    return BatchEnsemble(
        network=network,
        first_epochs=first_epochs,
        fit=fit,
        seed=seed,
        device=device,
        overrides={"fast_weights": fast},
        plugins=plugins,
    )


class BatchEnsemble(Strategy):
    """Trains a ``BatchEnsembleNetwork``: its first task for longer if asked, later ones from the fittest if asked.

    Args:
        network: What is trained.
        first_epochs: Epochs of the first task; None for those of ``fit``.
        options: As in ``Strategy``.
    """

    network: BatchEnsembleNetwork

    def __init__(
        self, *, network: BatchEnsembleNetwork, first_epochs: int | None = None, **options: Any
    ) -> None:
        super().__init__(network=network, **options)
        self.first_epochs = first_epochs

    def steps_for(self, images: int, task: int = 0) -> int:
        """See ``Strategy.steps_for``; the first task may have epochs of its own."""
        steps = super().steps_for(images, task)
        return steps if task or self.first_epochs is None else steps * self.first_epochs // self.fit.epochs

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """Choose where the task starts, where that is to be chosen, and train it."""
        tasks, epochs = self.network.num_tasks, self.fit.epochs
        if tasks == 1 and self.first_epochs is not None:
            epochs = self.first_epochs
            self.start_phase(epochs)
        elif tasks > 1 and self.network.started_from is not None:
            self.meter.new_phase()
            self.network.start_from(fittest_task(self, validation, self._task_seed(tasks)))
            self.start_phase()
        self.run_epochs(epochs, validation)
