"""DEN: dynamically expandable networks (Yoon, Yang, Lee and Hwang, ICLR 2018, arXiv 1708.01547)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from avalanche.benchmarks import CLExperience
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from lifelong_ens.errors import InputError
from lifelong_ens.networks.expandable import DenNetwork, Tensors
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.proximal import shrink, shrink_groups, step_size
from strategies.base import Strategy


@dataclass(frozen=True)
class Settings:
    """The numbers of DEN, and what the paper and the released code do differently.

    Attributes:
        units: k, added to every layer by an expansion; below 1, as a share of the layer's first width.
        loss_threshold: tau; with a training loss above it a task expands the network.
        sigma: Drift of a linear layer's unit above which it is split.
        sigma_conv: That of a filter.
        max_split: At most so many units of a layer are split in a task, those that drifted most; or such a share.
        l1: mu.
        group_lasso: gamma.
        drift_penalty: lambda.
        per_step: ``l1`` and ``group_lasso`` are themselves the thresholds of a step, whatever the learning rate is.
        penalise_retraining: Retraining has the drift penalty too; else only the training after a split.
        always_split: Split where no expansion was needed too.
    """

    units: float = 0.05
    loss_threshold: float = 0.1
    sigma: float = 0.002
    sigma_conv: float = 0.02
    max_split: float = 0.05
    l1: float = 1e-4
    group_lasso: float = 1e-3
    drift_penalty: float = 0.2
    per_step: bool = False
    penalise_retraining: bool = True
    always_split: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise InputError(f"{name} is at least 0, not {value}.")


PRESETS = {
    "paper": Settings(),
    "released_code": Settings(
        units=10,
        max_split=10,
        loss_threshold=0.01,
        sigma=0.05,
        sigma_conv=0.05,
        l1=1e-5,
        group_lasso=1e-3,
        drift_penalty=0.25,
        per_step=True,
        penalise_retraining=False,
        always_split=False,
    ),
}


def den(  # noqa: PLR0913
    body: nn.Module,
    *,
    preset: Literal["paper", "released_code"] = "paper",
    units: float | None = None,
    loss_threshold: float | None = None,
    sigma: float | None = None,
    sigma_conv: float | None = None,
    max_split: float | None = None,
    l1: float | None = None,
    group_lasso: float | None = None,
    drift_penalty: float | None = None,
    growth_share: float = 0.5,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Den:
    """Retrain the units that a task needs, add units where that is not enough, split those that drift from their past.

    Args:
        body: The network; a classifier's last linear layer is taken off.
        preset: Whose numbers stand for options that are not given; the paper itself gives the sigmas alone.
        units: k: units that an expansion adds to every layer; below 1, a share of the layer's first width. Those that
            stay zero are dropped again (paper 0.05, code 10).
        loss_threshold: tau: a task whose training loss, cross entropy, stays above it expands (paper 0.1, code 0.01).
        sigma: Drift of its incoming weights above which a linear layer's unit is split (paper 0.002, code 0.05).
        sigma_conv: The same for filters (paper 0.02, code 0.05).
        max_split: At most so many units of a layer, or such a share, are split in a task (paper 0.05, code 10).
        l1: mu: sparsity of the first task, of a head that selects, and of added units (paper 1e-4, code 1e-5).
        group_lasso: gamma: pulls whole added units to zero (paper 1e-3, code 1e-3).
        drift_penalty: lambda: pulls retrained weights to what they were (paper 0.2, code 0.25).
        growth_share: Epochs after an expansion, and after a split, as a share of those of retraining.
        fit: How each task is trained; its epochs are those of retraining, its weight decay the l2 of retraining.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    given = {
        "units": units,
        "loss_threshold": loss_threshold,
        "sigma": sigma,
        "sigma_conv": sigma_conv,
        "max_split": max_split,
        "l1": l1,
        "group_lasso": group_lasso,
        "drift_penalty": drift_penalty,
    }
    if preset not in PRESETS:
        raise InputError(f"preset is {' or '.join(PRESETS)}, not {preset}.")
    if growth_share <= 0:
        raise InputError(f"growth_share is above 0, not {growth_share}.")
    chosen = {name: value for name, value in given.items() if value is not None}
    return Den(
        network=DenNetwork(body),
        method=replace(PRESETS[preset], **chosen),
        growth_share=growth_share,
        fit=fit,
        seed=seed,
        device=device,
        plugins=plugins,
    )


class Den(Strategy):
    """Every task after the first: select, retrain, expand, split, each with an optimizer and a schedule of its own.

    Source: Yoon et al. 2018, equations 2 to 6; the authors' TensorFlow code, jaehong31/DEN. l1 and group lasso are
    proximal steps after each step of the optimizer (``lifelong_ens.training.proximal``), by their weight times the
    step size, lr / (1 - momentum) for SGD: their balance with the loss is the same at any learning rate. The drift
    penalty goes by its gradient; l2 is the common weight decay. On filters l1 is the (2,1) norm, their norms' sum.

    * First task, Eq. 2: everything, with l1.
    * Selection, Eq. 3: the new head alone, with l1, for a tenth of the epochs (the code means a tenth, and does one
      step), then ``DenNetwork.select``.
    * Retraining, Eq. 4: weights between selected units, and the head on these; all others are put back after every
      step, so that momentum and weight decay move nothing either.
    * Expansion, Eq. 5, where the last epoch's mean training loss is above tau (the code looks at the last batch): k
      units more everywhere; they and the head are trained, with l1, then group lasso. Units that end at zero are
      dropped. A unit's group is all that makes its channel: rows, biases, shifts of norms.
    * Split of the old units that drifted most (the code keeps the least drifted of those above sigma), then Eq. 6:
      what was retrained and not split, and all that is new, pulled to the weights before the task. The paper
      has all weights in Eq. 6; those that were not selected, and the old halves of split units, belong to earlier
      tasks alone and stay.

    The presets differ. ``paper``: retraining has the drift penalty of Eq. 6 too, as the drift is to be measured at its
    solution; splits come with or without an expansion; sigma 0.002, for filters 0.02. The paper splits every unit
    above sigma, which at common learning rates is nearly every unit, and gives no other number: the rest is chosen
    on validation images. ``released_code``: its numbers, thresholds of l1 and group lasso per step of Adam at 1e-3, no
    penalty before the split, and splits after expansions alone. Its loss is sigmoid cross entropy; ours, as for
    all methods, softmax. Norms, which DEN does not have, are every task's own and trained in all phases.

    Args:
        network: What is trained.
        method: The numbers.
        growth_share: Epochs after an expansion, and after a split, as a share of ``fit``'s.
        options: As in ``Strategy``.
    """

    network: DenNetwork

    def __init__(
        self, *, network: DenNetwork, method: Settings, growth_share: float, **options: object
    ) -> None:
        super().__init__(network=network, **options)  # pyright: ignore
        self.method = method
        self.selection_epochs = math.ceil(self.fit.epochs / 10)
        self.growth_epochs = math.ceil(self.fit.epochs * growth_share)

    def steps_for(self, images: int, task: int = 0) -> int:
        """As many as if the network were expanded and units split in every task."""
        epochs = self.selection_epochs + self.fit.epochs + 2 * self.growth_epochs
        return math.ceil(images / self.train_mb_size) * epochs

    def grows_by_learning(self) -> str | None:
        """See ``Strategy.grows_by_learning``."""
        return "a task adds units where its loss stays high and splits those that drift"

    def check_model_and_optimizer(self, **kwargs: object) -> None:  # pyright: ignore
        """As in ``Strategy``.

        Raises:
            InputError: The experience does not hold exactly one new task.
        """
        tasks = self.network.num_tasks
        super().check_model_and_optimizer(**kwargs)
        if self.network.num_tasks != tasks + 1:
            raise InputError("den learns one new task at a time, and every task once.")

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """See the class."""
        if self.network.num_tasks == 1:
            self._phase(self.fit.epochs, validation, self._sparsify_all)
            return
        before = self.network.old_tensors()
        self._phase(self.selection_epochs, validation, self._sparsify_head)
        selected = self.network.select()
        self._retrain(selected, before, validation)
        expands = self.epoch_loss > self.method.loss_threshold and self.method.units > 0
        if expands:
            self._expand(validation)
        if expands or self.method.always_split:
            self._split(selected, before, validation)

    def _retrain(
        self, selected: list[Tensor], before: list[Tensors], validation: Sequence[CLExperience]
    ) -> None:
        network = self.network
        network.train_old(True)
        columns = network.head_columns(selected)
        held = _Held([*network.sub_network(selected), (network.head.weight, columns)])
        self._phase(self.fit.epochs, validation, held, before if self.method.penalise_retraining else None)
        network.train_old(False)

    def _expand(self, validation: Sequence[CLExperience]) -> None:
        self.network.grow([number(self.method.units, group.size) for group in self.network.groups])
        self._phase(self.growth_epochs, validation, self._sparsify_new)
        self.network.drop_zero_units()

    def _split(
        self, selected: list[Tensor], before: list[Tensors], validation: Sequence[CLExperience]
    ) -> None:
        network = self.network
        units = []
        for group, drift, filters in zip(
            network.groups, network.drift(before), network.filters(), strict=True
        ):
            sigma = self.method.sigma_conv if filters else self.method.sigma
            units.append(most_drifted(drift, sigma, number(self.method.max_split, group.size)))
        if not any(len(chosen) for chosen in units):
            return
        network.split(before, units)
        network.train_old(True)
        kept = [old.index_fill(0, split, False) for old, split in zip(selected, units, strict=True)]
        self._phase(self.growth_epochs, validation, _Held(network.sub_network(kept)), before)

    def _phase(
        self,
        epochs: int,
        validation: Sequence[CLExperience],
        after_step: Callable[[float], None],
        pulled_to: Sequence[Tensors] | None = None,
    ) -> None:
        """Train what is trainable now.

        Args:
            epochs: How long.
            validation: Held-out experiences.
            after_step: Called with the step size after every step.
            pulled_to: Where Eq. 6 pulls the weights that earlier tasks left.
        """
        self.start_phase(epochs)
        if pulled_to is not None:
            pairs = self._with_old(pulled_to)
            self.optimizer.register_step_pre_hook(lambda *_: _pull(pairs, self.method.drift_penalty))
        self.optimizer.register_step_post_hook(lambda optimizer, *_: after_step(step_size(optimizer)))
        self.run_epochs(epochs, validation)

    def _with_old(self, before: Sequence[Tensors]) -> list[tuple[nn.Parameter, Tensor]]:
        """The weights and biases that earlier tasks left, each with what it was."""
        pairs = []
        for layer, (weight, bias) in zip(self.network.layers(), before, strict=True):
            pairs.append((layer.layer.weight, weight))
            if bias is not None:
                pairs.append((layer.layer.bias, bias))
        return pairs

    def _threshold(self, penalty: float, size: float) -> float:
        return penalty if self.method.per_step else penalty * size

    def _sparsify_head(self, size: float) -> None:
        shrink(self.network.head.weight, self._threshold(self.method.l1, size))

    def _sparsify_all(self, size: float) -> None:
        weights = [layer.layer.weight for layer in self.network.layers()]
        self._sparsify([self.network.head.weight, *weights], size)

    def _sparsify_new(self, size: float) -> None:
        new = [part for layer in self.network.layers() for part in (layer.new_rows, layer.new_columns)]
        self._sparsify([self.network.head.weight, *(part for part in new if part is not None)], size)
        for parts in self.network.new_units():
            if parts:
                shrink_groups(parts, self._threshold(self.method.group_lasso, size))

    def _sparsify(self, weights: Sequence[Tensor], size: float) -> None:
        """Eq. 2: l1 of linear layers, of filters the sum of their norms."""
        threshold = self._threshold(self.method.l1, size)
        for weight in weights:
            if weight.dim() == 2:
                shrink(weight, threshold)
            else:
                shrink_groups([weight], threshold)


@torch.no_grad()
def _pull(pairs: Sequence[tuple[nn.Parameter, Tensor]], strength: float) -> None:
    """Add the gradient of ``strength * ||w - before||_2^2``."""
    for parameter, before in pairs:
        if parameter.grad is not None:
            parameter.grad.add_(parameter - before, alpha=2 * strength)


class _Held:
    """Puts back whatever a step moved outside of the masks, to the bit."""

    def __init__(self, masked: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        self.parts = [(parameter, mask, parameter.detach().clone()) for parameter, mask in masked]

    @torch.no_grad()
    def __call__(self, _: float) -> None:
        for parameter, mask, before in self.parts:
            parameter.copy_(torch.where(mask, parameter, before))


def number(units: float, width: int) -> int:
    """So many units, or below 1 that share of a width, rounded up."""
    return math.ceil(units * width) if units < 1 else round(units)


def most_drifted(drift: Tensor, sigma: float, limit: int) -> Tensor:
    """Indices of the units whose drift is above sigma, the ``limit`` that drifted most, in ascending order."""
    order = drift.argsort(descending=True, stable=True)[:limit]
    return order[drift[order] > sigma].sort().values
