"""Hyper-batch ensembles, and self-tuning networks, which are those of one member.

Source: Wenzel, Snoek, Tran and Jenatton, "Hyperparameter ensembles for robustness and uncertainty quantification",
NeurIPS 2020, equations 7-9. Every member of a BatchEnsemble is a function of its hyper-parameters; training sees
hyper-parameters drawn for every example, and their distribution is tuned on validation images in turn with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.convert import Norms, convert, export, replace_modules
from lifelong_ens.ensembles.ensemble import Ensemble, finished
from lifelong_ens.ensembles.space import LABEL_SMOOTHING, Range, Space, hyper_space, needed_validation
from lifelong_ens.ensembles.training import (
    BuildNetwork,
    Progress,
    new_network,
    parameter_groups,
    silent,
    train_network,
)
from lifelong_ens.layers.hyper import HyperDropout, HyperLayer, HyperSelection
from lifelong_ens.layers.log_uniform import LogUniform
from lifelong_ens.layers.rank1 import Rank1Layer
from lifelong_ens.training.data import ImageData
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.seeding import derived_seed, seeded


class HyperBatchEnsemble(Ensemble):
    """A BatchEnsemble whose members' weights are functions of hyper-parameters; each answers at the mean of its own.

    Attributes:
        body: The network, with ``HyperLayer`` and ``HyperDropout`` in place of torch's layers.
        bounds: The distribution of the members' hyper-parameters.
        space: What the hyper-parameters are.

    Args:
        network: What is converted; it stays as it is.
        num_members: How many members.
        method: What makes it.
        ranges: Of the hyper-parameters, as ``hyper_space`` has them.
        num_images: Training images.
        init: How fast weights start, as in ``batch_ensemble``.
        norm: As in ``batch_ensemble``.
        tied: One pair of fast weights per member and layer for W and D, and the L2 norm is that of ``W + diag(e) D``;
            else a pair each, and the norm is that of the members' weights.
    """

    kind = "hyper_batch"

    def __init__(
        self,
        network: nn.Module,
        num_members: int,
        method: str,
        *,
        ranges: Mapping[str, Any],
        num_images: int,
        init: str = "gaussian",
        norm: Norms = "shared",
        tied: bool = True,
    ) -> None:
        super().__init__(num_members, method)
        self.space = hyper_space(network, num_images, **ranges)
        self.tied = tied
        self._plan = {"ranges": dict(ranges), "num_images": num_images, "norm": norm, "tied": tied}
        self.selection = HyperSelection()
        self.body = with_hyper_members(
            network, num_members, self.space, self.selection, init=init, norm=norm, tied=tied
        )
        self.bounds = LogUniform(num_members, self.space.low, self.space.high)
        self.to(next(network.parameters()).device)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, ...)`` to ``(members, batch, classes)``."""
        return self.logits_at(x, self.bounds.mean())

    def logits_at(self, x: Tensor, values: Tensor) -> Tensor:
        """Every member's logits for every row, ``(members, batch, classes)``, at given hyper-parameters.

        Args:
            x: Inputs, ``(batch, ...)``.
            values: Of every member, ``(members, hyper-parameters)``, or of every member and row, ``(members, batch,
                hyper-parameters)``.
        """
        scaled = self.bounds.scaled(values)
        rows = x.repeat(self.num_members, *[1] * (x.dim() - 1))
        # one member's dense weight may be cheaper than scaling activations
        members = 0 if self.num_members == 1 else None
        with self.selection.of(members), self.selection.at(values.flatten(0, -2), scaled.flatten(0, -2)):
            return self.body(rows).unflatten(0, (self.num_members, len(x)))

    def training_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mean of the members' losses at hyper-parameters drawn for every member and example (equation 8).

        Cross entropy with the example's label smoothing, computed with its dropout rates, plus its L2 norms divided
        by the number of training images. No gradient reaches the distribution.
        """
        with torch.no_grad():
            values = self.bounds.sample(len(x))
        log_probs = self.logits_at(x, values).float().log_softmax(dim=-1)
        loss = -log_probs.gather(2, labels.expand(self.num_members, -1).unsqueeze(-1)).squeeze(-1)
        if LABEL_SMOOTHING in self.space.ranges:
            smoothing = values[..., self.space.index(LABEL_SMOOTHING)].to(loss.dtype)
            loss = torch.lerp(loss, -log_probs.mean(dim=-1), smoothing)
        return loss.mean() + self.l2(values)

    def l2(self, values: Tensor) -> Tensor:
        """The L2 term of the loss at hyper-parameters ``(members, examples, hyper-parameters)``, exactly; a scalar."""
        scaled, total = self.bounds.scaled(values), values.new_zeros(())
        # products of what is in float32, not under autocast
        with torch.autocast(values.device.type, enabled=False):
            for name, groups in self.space.layers.items():
                layer = self.body.get_submodule(name)
                if isinstance(layer, HyperLayer):
                    kernel, bias = (values[..., self.space.index(group)] for group in groups)
                    total = total + layer.l2(scaled, kernel, bias, fast_weights=not self.tied)
        return total / self.space.num_images

    def tuning_loss(self, x: Tensor, labels: Tensor, entropy_weight: float) -> Tensor:
        """The ensemble's negative log-likelihood at drawn hyper-parameters, less their entropy (equation 9).

        The entropy is the mean over members and hyper-parameters, as in the authors' code; the paper writes the sum.
        """
        log_probs = self.logits_at(x, self.bounds.sample(len(x))).float().log_softmax(dim=-1)
        mixed = torch.logsumexp(log_probs, dim=0) - math.log(self.num_members)
        return -mixed.gather(1, labels.unsqueeze(1)).mean() - entropy_weight * self.bounds.entropy().mean()

    def hyper_parameters(self) -> dict[str, list[float]]:
        """What each member answers at, by name."""
        means = self.bounds.mean().detach().T.tolist()
        return dict(zip(self.space.ranges, means, strict=True))

    def export_member(self, member: int) -> nn.Module:
        """One member as the plain network it was converted from; equal to 1e-6 in evaluation."""
        with torch.no_grad():
            means = self.bounds.mean()
            with self.selection.at(means, self.bounds.scaled(means)):
                body = export(self.body, member)
        dropouts = [module for module in body.modules() if isinstance(module, HyperDropout)]
        return replace_modules(
            body, {one: one.export(float(means[member, one.coordinate])) for one in dropouts}
        )

    def plan(self) -> dict[str, Any]:
        """How it is converted and what its hyper-parameters are."""
        return {"num_members": self.num_members, **self._plan}

    @classmethod
    def rebuild(cls, plan: Mapping[str, Any], build_network: BuildNetwork) -> Self:
        """The same conversion of the same network."""
        options = {**plan}
        return cls(build_network(), options.pop("num_members"), "", **options)


def with_hyper_members(
    model: nn.Module,
    num_members: int,
    space: Space,
    selection: HyperSelection,
    *,
    init: str = "gaussian",
    norm: Norms = "shared",
    tied: bool = True,
) -> nn.Module:
    """A copy of any network whose linear layers and convolutions are functions of hyper-parameters, with members.

    Attention stays as it is and shared. Trained weights are kept, as W.

    Args:
        model: The network.
        num_members: How many members.
        space: The hyper-parameters.
        selection: What all layers will read.
        init: As in ``batch_ensemble``.
        norm: As in ``batch_ensemble``.
        tied: As in ``HyperLayer``.

    Raises:
        UnfitNetworkError: No layer can be converted.
    """
    body, _ = convert(
        model, num_members, exclude=[nn.MultiheadAttention], init=init, norm=norm, selection=selection
    )
    options: dict[str, Any] = {"init": init, "tied": tied}
    replacements: dict[nn.Module, nn.Module] = {
        module: HyperLayer(module, selection, len(space.ranges), **options)
        for module in body.modules()
        if isinstance(module, Rank1Layer)
    }
    for name, coordinate in space.dropouts.items():
        module = body.get_submodule(name)
        replacements[module] = HyperDropout(module, selection, space.index(coordinate))
    return replace_modules(body, replacements)


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
        self._steps = 0

    def after_step(self) -> None:
        """Count a training step; every so many of them, tune."""
        self._steps += 1
        if self._steps % self.every == 0:
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
    norm: Norms = "shared",
    tied: bool = True,
) -> Ensemble:
    """A hyper-batch ensemble: a BatchEnsemble whose members tune their own hyper-parameters while they train.

    Tuning steps are part of its training cost. ``fit.weight_decay`` acts on what has no L2 coefficient of its own, such
    as norms, and never on fast weights and embeddings.

    Source: Wenzel et al., NeurIPS 2020, section 4; defaults as in the authors' code for Wide ResNets, but for the fast
    weights, N(1, 0.75^2) there, label smoothing, which the paper tunes and the code does not, and the start of the
    bounds, here the whole range.

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
        norm: ``per_member``, ``statistics_only`` or ``shared``, as the authors have it.
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
    network = new_network(build_network, seed, device)
    with seeded(derived_seed(seed, -1)):
        ensemble = HyperBatchEnsemble(network, num_members, method, num_images=len(train), **options)
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
