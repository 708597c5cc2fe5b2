"""Hyper-batch ensembles, and self-tuning networks, which are those of one member.

Source: Wenzel, Snoek, Tran and Jenatton, "Hyperparameter ensembles for robustness and uncertainty quantification",
NeurIPS 2020, equations 7-9. Every member of a BatchEnsemble is a function of its hyper-parameters; training sees
hyper-parameters drawn for every example, and their distribution is tuned on validation images in turn with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.convert import Norms
from lifelong_ens.ensembles.ensemble import Ensemble, finished
from lifelong_ens.ensembles.hyper_ensemble import HyperBatchEnsemble
from lifelong_ens.ensembles.space import Range, needed_validation
from lifelong_ens.ensembles.training import (
    BuildNetwork,
    Progress,
    new_network,
    parameter_groups,
    silent,
    train_network,
)
from lifelong_ens.layers.hyper import HyperLayer
from lifelong_ens.training.data import ImageData
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.seeding import derived_seed, seeded


class Tuner:
    """Tunes the distribution of hyper-parameters on validation images, in turn with training.

    Attributes:
        meter: What the tuning steps took.

    Args:
        ensemble: What is tuned; in evaluation mode while it is.
        validation: The images.
        fit: Batch size and precision.
        every: Training steps between two tuning steps.
        learning_rate: Of Adam on the logarithms of the bounds.
        entropy_weight: How much entropy counts against the likelihood.
        seed: Of the order of the images.
    """

    def __init__(
        self,
        ensemble: HyperBatchEnsemble,
        validation: ImageData,
        fit: Fit,
        *,
        every: int,
        learning_rate: float,
        entropy_weight: float,
        seed: int,
    ) -> None:
        self.ensemble, self.validation, self.fit = ensemble, validation, fit
        self.every, self.entropy_weight = every, entropy_weight
        self.meter = TrainingMeter()
        self.device = ensemble.bounds.log_low.device
        self._bounds = [*ensemble.bounds.parameters()]
        self._adam = torch.optim.Adam(self._bounds, lr=learning_rate)
        self._order = torch.Generator().manual_seed(seed)
        self._batches = self._endless()
        sizes = torch.arange(len(validation)).split(fit.batch_size)
        self._sizes = itertools.cycle([len(rows) for rows in sizes])
        self._steps = 0

    def after_step(self, left_out: bool = False) -> None:
        """Count a training step; every so many of them, tune, or after one that was left out only count that too."""
        self._steps += 1
        if self._steps % self.every:
            return
        rows = next(self._sizes)
        if left_out and self.meter.measured:
            self.meter.count(rows)
        else:
            self.tune(*next(self._batches))

    def tune(self, images: Tensor, labels: Tensor) -> None:
        """One step. Only the bounds move."""
        self.ensemble.eval()
        if self.meter.measured:
            self._update(images, labels)
        else:
            with self.meter.measure(self.ensemble, len(labels)):
                self._update(images, labels)
        self.meter.count(len(labels))
        self.ensemble.train()

    def _update(self, images: Tensor, labels: Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fit.amp):
            loss = self.ensemble.tuning_loss(images, labels, self.entropy_weight)
        # not backward, which would make the gradients of all weights too
        for bound, gradient in zip(self._bounds, torch.autograd.grad(loss, self._bounds), strict=True):
            bound.grad = gradient
        self._adam.step()
        self._adam.zero_grad()
        self.ensemble.bounds.project()

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            order = torch.randperm(len(self.validation), generator=self._order)
            yield from self.validation.subset(order).batches(self.fit.batch_size, self.device)


def fit_hyper_batch(  # noqa: PLR0913 the method has these options
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None = None,
    *,
    num_members: int = 4,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    l2: Range = (0.1, 100.0),
    label_smoothing: Range | None = (1e-5, 0.2),
    dropout: Range | None = (1e-3, 0.9),
    tuning_learning_rate: float = 1e-3,
    entropy_weight: float = 1e-3,
    tune_every: int = 3,
    init: str = "gaussian",
    norm: Norms = "per_member",
    tied: bool = True,
) -> Ensemble:
    """A hyper-batch ensemble: a BatchEnsemble whose members tune their own hyper-parameters while they train.

    Tuning steps are part of its training cost. ``fit.weight_decay`` acts on what has no L2 coefficient of its own, such
    as norms, and never on fast weights and embeddings.

    Source: Wenzel et al., NeurIPS 2020, section 4; defaults as in the authors' code for Wide ResNets, but for the fast
    weights, N(1, 0.75^2) there, norms, shared there, label smoothing, which the paper tunes and the code does not, and
    the start of the bounds, here the whole range. They are for a hundred thousand steps on fifty thousand images: with
    a thousand steps the members have not learnt how to answer to hyper-parameters, and the bounds hardly move; give a
    lower ``l2`` and a higher ``tuning_learning_rate``.

    Args:
        build_network: Makes one untrained classifier.
        train: Training images.
        validation: What hyper-parameters are tuned on.
        num_members: How many members.
        fit: How it is trained.
        seed: Of everything random.
        device: Where it is trained.
        progress: Hears of every step.
        l2: Lowest and highest L2 coefficient of a group of layers, divided by the number of training images.
        label_smoothing: Lowest and highest; None for none.
        dropout: Lowest and highest rate of each dropout layer; None for the network's own.
        tuning_learning_rate: Of Adam on the logarithms of the bounds.
        entropy_weight: Of the mean entropy over members and hyper-parameters.
        tune_every: Training steps for one tuning step.
        init: How fast weights start: ``random_sign``, ``gaussian`` or ``ones``.
        norm: ``per_member``, ``statistics_only``, or ``shared`` as the authors have it.
        tied: One pair of fast weights per member and layer, outside the L2 norm, as the authors have it for Wide
            ResNets; else two, inside it.
    """
    validation = needed_validation("hyper_batch", train, validation, num_members)
    return _fit(
        "hyper_batch",
        build_network,
        train,
        validation,
        fit=fit or Fit(),
        seed=seed,
        device=device,
        progress=progress,
        tuning={"every": tune_every, "learning_rate": tuning_learning_rate, "entropy_weight": entropy_weight},
        num_members=num_members,
        ranges={"l2": l2, "label_smoothing": label_smoothing, "dropout": dropout},
        init=init,
        norm=norm,
        tied=tied,
    )


def fit_self_tuning(
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None = None,
    *,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    l2: Range = (0.1, 100.0),
    label_smoothing: Range | None = (1e-5, 0.2),
    dropout: Range | None = (1e-3, 0.9),
    tuning_learning_rate: float = 1e-3,
    entropy_weight: float = 1e-3,
    tune_every: int = 3,
) -> Ensemble:
    """A self-tuning network: a hyper-batch ensemble of one member, whose fast weights start at one.

    Source: MacKay et al., ICLR 2019, as the case K = 1 of Wenzel et al., NeurIPS 2020: log-uniform in place of
    perturbed hyper-parameters, and the schedule of ``hyper_batch``.

    Args:
        build_network: Makes one untrained classifier.
        train: Training images.
        validation: What hyper-parameters are tuned on.
        fit: How it is trained.
        seed: Of everything random.
        device: Where it is trained.
        progress: Hears of every step.
        l2: As in ``hyper_batch``.
        label_smoothing: As in ``hyper_batch``.
        dropout: As in ``hyper_batch``.
        tuning_learning_rate: As in ``hyper_batch``.
        entropy_weight: As in ``hyper_batch``.
        tune_every: As in ``hyper_batch``.
    """
    validation = needed_validation("self_tuning", train, validation, 1)
    return _fit(
        "self_tuning",
        build_network,
        train,
        validation,
        fit=fit or Fit(),
        seed=seed,
        device=device,
        progress=progress,
        tuning={"every": tune_every, "learning_rate": tuning_learning_rate, "entropy_weight": entropy_weight},
        num_members=1,
        ranges={"l2": l2, "label_smoothing": label_smoothing, "dropout": dropout},
        init="ones",
    )


def _fit(
    method: str,
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData,
    *,
    fit: Fit,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    tuning: Mapping[str, Any],
    num_members: int,
    **options: Any,
) -> Ensemble:
    # made where it is the same for every device
    network = new_network(build_network, seed, "cpu")
    with seeded(derived_seed(seed, -1)):
        ensemble = HyperBatchEnsemble(network, num_members, method, num_images=len(train), **options)
    ensemble.to(device)
    if fit.compile:
        ensemble.body.compile()
    tuner, meter = Tuner(ensemble, validation, fit, seed=seed, **tuning), TrainingMeter()
    train_network(
        ensemble,
        train,
        validation,
        fit,
        seed=seed,
        meter=meter,
        loss=ensemble.training_loss,
        groups=_groups(ensemble),
        after_step=tuner.after_step,
        label=method,
        progress=progress,
    )
    # its time is in the training's already
    meter.flops += tuner.meter.flops
    meter.saved_bytes = max(meter.saved_bytes, tuner.meter.saved_bytes)
    return finished(ensemble, build_network, meter, 1)


def _groups(ensemble: HyperBatchEnsemble) -> list[dict[str, Any]]:
    """All weights; decay only for what the L2 term does not see."""
    layers = [module for module in ensemble.body.modules() if isinstance(module, HyperLayer)]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    groups = []
    for group in parameter_groups(ensemble.body):
        own = [parameter for parameter in group["params"] if id(parameter) in inside]
        rest = [parameter for parameter in group["params"] if id(parameter) not in inside]
        groups += [{**group, "params": own, "weight_decay": 0.0}, {**group, "params": rest}]
    return [group for group in groups if group["params"]]
