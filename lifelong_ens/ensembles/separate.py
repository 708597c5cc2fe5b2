"""Ensembles of separate networks, whatever made them differ; and the single network, which is one of one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lifelong_ens.accounting.flops import layer_calls
from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.ensembles.ensemble import Ensemble, finished
from lifelong_ens.ensembles.training import (
    BuildNetwork,
    Each,
    Progress,
    new_network,
    silent,
    train_apart,
    train_network,
)
from lifelong_ens.layers.structured import UNIT_LAYERS
from lifelong_ens.networks.channels import trace_channels
from lifelong_ens.networks.cutting import cut_out
from lifelong_ens.training.data import ImageData, channels_last
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.seeding import derived_seed


class SeparateNetworks(Ensemble):
    """Networks that have nothing in common, run one after the other.

    Weights that are zero, as masks leave them, are stored as bits and counted as nothing.

    Args:
        networks: The members.
        method: What made them.
        weights: Their shares of the mean probability; equal if not given.
        widths: Where channels were cut out of the members: for each, how many are left of a group, by its name.
    """

    kind = "separate"

    def __init__(
        self,
        networks: Iterable[nn.Module],
        method: str,
        weights: Tensor | None = None,
        widths: Sequence[Mapping[str, int]] | None = None,
    ) -> None:
        networks = list(networks)
        super().__init__(len(networks), method, weights)
        self.networks, self.widths = nn.ModuleList(networks), widths

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, ...)`` to ``(members, batch, classes)``."""
        x = channels_last(x)
        return torch.stack([network(x) for network in self.networks])

    def export_member(self, member: int) -> nn.Module:
        """See ``Ensemble.export_member``: a copy of the network, zeros of masks in its weights."""
        self._check_member(member)
        return copy.deepcopy(self.networks[member])

    def plan(self) -> dict[str, Any]:
        """How many networks, and how wide."""
        widths = {} if self.widths is None else {"widths": self.widths}
        return {"num_members": self.num_members, **widths}

    @classmethod
    def rebuild(cls, plan: Mapping[str, Any], build_network: BuildNetwork) -> Self:
        """As many networks as were saved, as wide as they were."""
        if "widths" not in plan:
            return cls((build_network() for _ in range(plan["num_members"])), "")
        whole = build_network()
        groups = trace_channels(whole)
        sizes = {group.name: group.size for group in groups}
        kept = [
            {name: torch.arange(sizes[name]) < width for name, width in widths.items()}
            for widths in plan["widths"]
        ]
        return cls((cut_out(whole, groups, channels) for channels in kept), "", widths=plan["widths"])

    def _num_parameters(self) -> int:
        masked = {id(layer.weight) for layer in self.modules() if isinstance(layer, UNIT_LAYERS)}
        return sum(
            int(torch.count_nonzero(parameter)) if id(parameter) in masked else parameter.numel()
            for parameter in self.parameters()
        )

    def _zero_flops(self, x: Tensor) -> float:
        calls = layer_calls(self, x)
        return sum(
            call.flops * (1 - int(call.weight.count_nonzero()) / call.weight.numel()) for call in calls
        )


def fit_deep(
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None = None,
    *,
    num_members: int = 4,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    each: Each = map,
) -> Ensemble:
    """A deep ensemble: networks that differ in initial weights and in the order of the data.

    Source: Lakshminarayanan et al., NeurIPS 2017, without adversarial training.

    Args:
        build_network: Makes one untrained classifier.
        train: Training images.
        validation: For early stopping alone.
        num_members: How many networks.
        fit: How each is trained.
        seed: Of the first network; the others have seeds that follow from it.
        device: Where they are trained.
        progress: Hears of every step.
        each: Calls the training of each network, as ``map`` does; in other processes, for members at once.
    """
    return _separate(
        "deep",
        build_network,
        train,
        validation,
        fit=fit or Fit(),
        seeds=[derived_seed(seed, member) for member in range(num_members)],
        device=device,
        progress=progress,
        each=each,
    )


def fit_single(
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None = None,
    *,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Ensemble:
    """One network, the first of a deep ensemble of the same seed.

    Args:
        build_network: Makes one untrained classifier.
        train: Training images.
        validation: For early stopping alone.
        fit: How it is trained.
        seed: Of its initial weights and of the order of the data.
        device: Where it is trained.
        progress: Hears of every step.
    """
    return _separate(
        "single",
        build_network,
        train,
        validation,
        fit=fit or Fit(),
        seeds=[seed],
        device=device,
        progress=progress,
    )


def fit_single_equal_cost(
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None = None,
    *,
    num_members: int = 4,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Ensemble:
    """One network trained for the FLOPs of a deep ensemble: so many times the epochs.

    Args:
        build_network: Makes one untrained classifier.
        train: Training images.
        validation: For early stopping alone.
        num_members: Of the ensemble whose cost it has.
        fit: How a member of that ensemble is trained; the schedule is stretched.
        seed: Of its initial weights and of the order of the data.
        device: Where it is trained.
        progress: Hears of every step.
    """
    fit = fit or Fit()
    return _separate(
        "single_equal_cost",
        build_network,
        train,
        validation,
        fit=fit,
        epochs=fit.epochs * num_members,
        seeds=[seed],
        device=device,
        progress=progress,
    )


def _separate(
    method: str,
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None,
    *,
    fit: Fit,
    seeds: Sequence[int],
    device: torch.device | str,
    progress: Progress,
    epochs: int | None = None,
    each: Each = map,
) -> Ensemble:
    """Networks that differ in their seeds alone."""

    def train_one(member: int, meter: TrainingMeter) -> nn.Module:
        return train_network(
            new_network(build_network, seeds[member], device),
            train,
            validation,
            fit,
            seed=seeds[member],
            meter=meter,
            epochs=epochs,
            label=f"{method} {member + 1}/{len(seeds)}" if len(seeds) > 1 else method,
            progress=progress,
        )

    networks, meter = train_apart(train_one, range(len(seeds)), each)
    return finished(SeparateNetworks(networks, method), build_network, meter, len(seeds))
