"""BatchEnsemble: members that share all weights but two vectors for every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.convert import RANK1, MemberNetwork, Norms, batch_ensemble
from lifelong_ens.ensembles.ensemble import Ensemble, finished
from lifelong_ens.ensembles.training import (
    BuildNetwork,
    ComputeLoss,
    Progress,
    new_network,
    parameter_groups,
    silent,
    train_network,
)
from lifelong_ens.errors import InputError
from lifelong_ens.training.data import ImageData, channels_last
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.losses import member_loss
from lifelong_ens.training.seeding import seeded


@dataclass(frozen=True)
class Recipe:
    """What a preset of BatchEnsemble stands for.

    Attributes:
        init: How fast weights start.
        norm: What norms share.
        batch: ``split`` a mini-batch over the members, or ``tile`` it, every member sees all of it.
        epochs: Relative to those of one network.
        fast_rate: Learning rate of fast weights relative to that of the others.
        first_layer: Whether the first layer has members too.
    """

    init: Literal["random_sign", "gaussian", "ones"]
    norm: Norms
    batch: Literal["split", "tile"]
    epochs: float
    fast_rate: float
    first_layer: bool = True


RECIPES = {
    "paper": Recipe("random_sign", "per_member", "split", 1.5, 1.0),
    "uncertainty_baselines": Recipe("gaussian", "shared", "tile", 1.0, 0.5),
    "fast": Recipe("gaussian", "per_member", "tile", 1.0, 0.5, first_layer=False),
}


class SharedNetwork(Ensemble):
    """Members of one converted network.

    Args:
        network: From ``batch_ensemble``.
        norm: As it was converted.
        exclude: Names of the layers that were left shared.
    """

    kind = "shared"

    def __init__(self, network: MemberNetwork, norm: Norms, exclude: list[str]) -> None:
        super().__init__(network.num_members, "batch_ensemble")
        self.network, self.norm, self.exclude = network, norm, exclude

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, ...)`` to ``(members, batch, classes)``."""
        return self.network(channels_last(x))

    def export_member(self, member: int) -> nn.Module:
        """See ``Ensemble.export_member``: the member's numbers folded into the shared weights."""
        self._check_member(member)
        return self.network.export_member(member)

    def plan(self) -> dict[str, Any]:
        """How the network was converted."""
        return {"num_members": self.num_members, "norm": self.norm, "exclude": self.exclude}

    @classmethod
    def rebuild(cls, plan: Mapping[str, Any], build_network: BuildNetwork) -> Self:
        """The converted network."""
        options: Any = {"norm": plan["norm"], "exclude": plan["exclude"]}
        network = batch_ensemble(build_network(), plan["num_members"], init="ones", **options)
        return cls(network, plan["norm"], plan["exclude"])


def fit_batch_ensemble(
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None = None,
    *,
    num_members: int = 4,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    preset: Literal["paper", "uncertainty_baselines", "fast"] = "uncertainty_baselines",
    init: Literal["random_sign", "gaussian", "ones"] | None = None,
    norm: Norms | None = None,
    fast_rate: float | None = None,
) -> Ensemble:
    """BatchEnsemble: shared weights, rank-1 members, trained as one network in which all members run at once.

    Source: Wen et al., ICLR 2020. Three presets: ``paper``, random signs, each mini-batch split over the members and
    1.5 times the epochs; ``uncertainty_baselines``, the authors' later code: N(1, 0.5^2), every member sees the whole
    mini-batch, fast weights learn at half the rate, BatchNorm shared over all members' rows; ``fast``, ours: as that,
    with norms of each member's own and a shared first layer, which runs once per input. Where the paper is silent on
    norms, ``paper`` has one per member. Fast weights have no weight decay.

    Args:
        build_network: Makes one untrained classifier.
        train: Training images.
        validation: For early stopping alone.
        num_members: How many members.
        fit: How a single network is trained.
        seed: Of initial weights and of the order of the data.
        device: Where it is trained.
        progress: Hears of every step.
        preset: ``paper``, ``uncertainty_baselines`` or ``fast``.
        init: How fast weights start: ``random_sign``, ``gaussian`` or ``ones``; the preset's if not given.
        norm: ``per_member``, ``statistics_only`` or ``shared``; the preset's if not given.
        fast_rate: Learning rate of fast weights relative to that of the others; the preset's if not given.
    """
    fit = fit or Fit()
    if preset not in RECIPES:
        raise InputError(f"preset is one of {', '.join(RECIPES)}, not {preset!r}.")
    recipe, meter = RECIPES[preset], TrainingMeter()
    chosen: Norms = norm or recipe.norm
    plain = new_network(build_network, seed, device)
    exclude = [] if recipe.first_layer else first_layer(plain)
    with seeded(seed):
        network = batch_ensemble(plain, num_members, init=init or recipe.init, norm=chosen, exclude=exclude)
    rate = fit.learning_rate * (recipe.fast_rate if fast_rate is None else fast_rate)
    train_network(
        network,
        train,
        validation,
        fit,
        seed=seed,
        meter=meter,
        epochs=max(round(fit.epochs * recipe.epochs), 1),
        groups=parameter_groups(network, rate),
        loss=_split_loss(network) if recipe.batch == "split" else None,
        label="batch_ensemble",
        progress=progress,
    )
    return finished(SharedNetwork(network, chosen, exclude), build_network, meter, 1)


def _split_loss(network: MemberNetwork) -> ComputeLoss:
    def loss(images: Tensor, labels: Tensor) -> Tensor:
        # what is left at the end of an epoch may be too few rows for norms of each member's own
        if len(images) < 2 * network.num_members:
            return member_loss(network(images), labels)
        return member_loss(network.split(images), labels)

    return loss


def first_layer(network: nn.Module) -> list[str]:
    """The name of the first layer that could have members, in a list."""
    return [name for name, module in network.named_modules() if type(module) in RANK1][:1]
