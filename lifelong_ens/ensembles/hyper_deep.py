"""Hyper-deep ensembles: networks that differ in hyper-parameters and in initial weights, chosen greedily.

Source: Wenzel, Snoek, Tran and Jenatton, "Hyperparameter ensembles for robustness and uncertainty quantification",
NeurIPS 2020, Algorithm 1. The authors' public code stops after the first greedy selection; here both are done.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.ensembles.ensemble import Ensemble, finished
from lifelong_ens.ensembles.greedy import greedy_selection
from lifelong_ens.ensembles.separate import SeparateNetworks
from lifelong_ens.ensembles.space import (
    LABEL_SMOOTHING,
    LEARNING_RATE,
    Range,
    decay_groups,
    hyper_space,
    needed_validation,
)
from lifelong_ens.ensembles.training import (
    BuildNetwork,
    Each,
    Progress,
    new_network,
    silent,
    train_network,
)
from lifelong_ens.errors import InputError, NonFiniteLossError
from lifelong_ens.training.data import ImageData, channels_last
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.loop import evaluating
from lifelong_ens.training.losses import member_loss
from lifelong_ens.training.seeding import derived_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One trained network.

    Attributes:
        values: Its hyper-parameters, by name; empty for the configuration that was given.
        number: Which of the seeds it was trained with.
        network: On the CPU; None where its loss was not finite.
        log_probs: On the validation images, ``(batch, classes)``; None where its loss was not finite.
        meter: What its training took.
    """

    values: dict[str, float]
    number: int
    network: nn.Module | None
    log_probs: Tensor | None
    meter: TrainingMeter


class HyperGrid:
    """Networks of a grid of hyper-parameters and seeds, each trained when it is first asked for.

    Attributes:
        configurations: Hyper-parameters, one set a row; the first is empty, the configuration that was given.
        searched: The candidates of random search: every row with the first seed.
        picks: How often the greedy selection from ``searched`` picks each row.

    Args:
        build_network: Makes one untrained classifier.
        train: Training images.
        validation: What candidates are chosen by.
        num_members: K, the most members of an ensemble and the number of seeds.
        fit: How the first row is trained, and the others but for their hyper-parameters.
        seed: All seeds and draws follow from it.
        device: Where networks are trained.
        progress: Hears of every step.
        each: Calls the training of each network, as ``map`` does.
        num_candidates: How many rows.
        ranges: As ``hyper_space`` has them.
    """

    def __init__(
        self,
        build_network: BuildNetwork,
        train: ImageData,
        validation: ImageData | None,
        *,
        num_members: int,
        fit: Fit | None,
        seed: int,
        device: torch.device | str,
        progress: Progress,
        each: Each = map,
        num_candidates: int,
        **ranges: Any,
    ) -> None:
        self.validation = needed_validation("a hyper-deep ensemble", train, validation, num_members)
        if num_candidates < 1:
            raise InputError(f"num_candidates is at least 1, not {num_candidates}.")
        self.build_network, self.train, self.num_members = build_network, train, num_members
        self.fit, self.seed, self.device, self.progress = fit or Fit(), seed, device, progress
        self.each = each
        self._trained: dict[tuple[int, int], Candidate] = {}
        self.space = hyper_space(new_network(build_network, seed, "cpu"), len(train), **ranges)
        draws = torch.Generator().manual_seed(derived_seed(seed, -1))
        drawn = [self.space.draw(draws) for _ in range(num_candidates - 1)]
        self.configurations: list[dict[str, float]] = [{}, *drawn]
        self.searched = self.candidates([(row, 0) for row in range(num_candidates)], "hyper search")
        self.picks = self._select(self.searched, num_members)

    def candidates(self, places: Sequence[tuple[int, int]], label: str) -> list[Candidate]:
        """The candidates at these rows and numbers of seeds."""
        new = [place for place in places if place not in self._trained]
        asked = [
            (self.configurations[row], number, f"{label} {count + 1}/{len(new)}")
            for count, (row, number) in enumerate(new)
        ]
        self._trained.update(zip(new, self.each(self._candidate, asked), strict=True))
        return [self._trained[place] for place in places]

    def hyper_deep(self) -> Ensemble:
        """Stratified: the picked rows with every seed, and the greedy selection from these."""
        grid = [(row, number) for row in self.picks for number in range(self.num_members)]
        stratified = self.candidates(grid, "hyper seeds")
        retrained = [candidate for candidate in stratified if candidate.number > 0]
        picks = self._select(stratified, self.num_members)
        return self._ensemble("hyper_deep", stratified, picks, [*self.searched, *retrained])

    def fixed_init_hyper(self) -> Ensemble:
        """The greedy selection from random search, all members from the same initial weights."""
        return self._ensemble("fixed_init_hyper", self.searched, self.picks, self.searched)

    def deep_of_best(self) -> Ensemble:
        """A deep ensemble of the best configuration of random search."""
        best = next(iter(self._select(self.searched, 1)))
        row = self.candidates([(best, number) for number in range(self.num_members)], "hyper seeds")
        picks = {place: 1 for place, candidate in enumerate(row) if candidate.network is not None}
        return self._ensemble("deep_of_best", row, picks, [*self.searched, *row[1:]])

    def best_of_search(self) -> Ensemble:
        """The best network of random search."""
        picks = self._select(self.searched, 1)
        return self._ensemble("best_of_search", self.searched, picks, self.searched)

    def __getstate__(self) -> dict[str, Any]:
        """For another process that trains a candidate: without those that are trained."""
        return {**vars(self), "_trained": {}, "searched": [], "each": map}

    def _candidate(self, asked: tuple[dict[str, float], int, str]) -> Candidate:
        values, number, label = asked
        seed, meter = derived_seed(self.seed, number), TrainingMeter()
        network = new_network(self.build_network, seed, self.device)
        for name, group in self.space.dropouts.items():
            if values:
                network.get_submodule(name).p = values[group]  # pyright: ignore
        run = torch.compile(network) if self.fit.compile else network
        smoothing = values.get(LABEL_SMOOTHING, 0.0)
        try:
            train_network(
                network,
                self.train,
                self.validation,
                replace(self.fit, learning_rate=values.get(LEARNING_RATE, self.fit.learning_rate)),
                seed=seed,
                meter=meter,
                loss=lambda images, labels: member_loss(run(images), labels, smoothing),
                groups=decay_groups(network, self.space, values) if values else None,
                label=label,
                progress=self.progress,
            )
        except NonFiniteLossError as error:
            log.warning("%s is left out, %s: %s", label, error, values)
            return Candidate(values, number, None, None, meter)
        log_probs = _log_probs(network, self.validation, self.device)
        return Candidate(values, number, network.cpu(), log_probs, meter)

    def _select(self, candidates: Sequence[Candidate], num_members: int) -> dict[int, int]:
        """How often each candidate is picked, by its place; those never picked are left out."""
        known = {place: one.log_probs for place, one in enumerate(candidates) if one.log_probs is not None}
        if not known:
            raise InputError("no candidate of the search has a finite loss; try a lower learning_rate.")
        counts = greedy_selection(
            torch.stack([*known.values()]), self.validation.labels, num_members
        ).tolist()
        return {place: count for place, count in zip(known, counts, strict=True) if count}

    def _ensemble(
        self,
        method: str,
        candidates: Sequence[Candidate],
        picks: dict[int, int],
        charged: Sequence[Candidate],
    ) -> Ensemble:
        """Picked candidates as an ensemble whose training is that of all that are ``charged``."""
        networks = []
        for place, count in picks.items():
            one = candidates[place]
            log.debug(
                "%s has %d times seed %d of %s", method, count, one.number, one.values or "the given options"
            )
            networks += [one.network] if one.network is not None else []
        weights = torch.tensor([float(count) for count in picks.values()])
        meter = TrainingMeter()
        for one in charged:
            meter.add(one.meter)
        ensemble = SeparateNetworks(networks, method, weights / weights.sum())
        return finished(ensemble, self.build_network, meter, len(charged)).to(self.device)


def fit_hyper_deep(  # noqa: PLR0913 the method has these options
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
    num_candidates: int = 10,
    l2: Range = (1e-2, 1e2),
    label_smoothing: Range | None = (1e-5, 0.2),
    dropout: Range | None = (1e-3, 0.9),
    learning_rate: Range | None = None,
) -> Ensemble:
    """A hyper-deep ensemble: random search, greedy selection, every choice with every seed, greedy selection again.

    The training of all candidates is charged to it: ``num_candidates + U (num_members - 1)`` networks where U different
    configurations were picked. They are kept in the CPU's memory until the ensemble is chosen. On few validation images
    the selection often ends early, with fewer members than asked for.

    Source: Wenzel et al., NeurIPS 2020, Algorithm 1; ranges as in the authors' code for Wide ResNets, dropout as for
    their small networks. There 50 or 100 configurations are drawn.

    Args:
        build_network: Makes one untrained classifier.
        train: Training images.
        validation: What networks are chosen by.
        num_members: Different networks at most, and seeds of every configuration.
        fit: How a network is trained; the first candidate exactly so, the others but for their hyper-parameters.
        seed: Of the common initial weights and of what is drawn; the other seeds follow from it.
        device: Where they are trained.
        progress: Hears of every step.
        each: Calls the training of each network, as ``map`` does; in other processes, for members at once.
        num_candidates: Configurations of the random search, the given one included.
        l2: Lowest and highest L2 coefficient of a group of layers, divided by the number of training images;
            torch's weight decay is twice the quotient.
        label_smoothing: Lowest and highest; None for none.
        dropout: Lowest and highest rate of each dropout layer; None for the network's own.
        learning_rate: Lowest and highest; None for that of ``fit``.
    """
    grid = HyperGrid(
        build_network,
        train,
        validation,
        num_members=num_members,
        fit=fit,
        seed=seed,
        device=device,
        progress=progress,
        each=each,
        num_candidates=num_candidates,
        l2=l2,
        label_smoothing=label_smoothing,
        dropout=dropout,
        learning_rate=learning_rate,
    )
    return grid.hyper_deep()


def fit_fixed_init_hyper(  # noqa: PLR0913 the method has these options
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
    num_candidates: int = 10,
    l2: Range = (1e-2, 1e2),
    label_smoothing: Range | None = (1e-5, 0.2),
    dropout: Range | None = (1e-3, 0.9),
    learning_rate: Range | None = None,
) -> Ensemble:
    """Networks of different hyper-parameters and the same initial weights, the greedy choice of a random search.

    The training of all candidates is charged to it.

    Source: Wenzel et al., NeurIPS 2020, "fixed init ens".

    Args:
        build_network: Makes one untrained classifier.
        train: Training images.
        validation: What networks are chosen by.
        num_members: Different networks at most.
        fit: How a network is trained; the first candidate exactly so, the others but for their hyper-parameters.
        seed: Of the common initial weights, the order of the data and of what is drawn.
        device: Where they are trained.
        progress: Hears of every step.
        each: Calls the training of each network, as ``map`` does; in other processes, for members at once.
        num_candidates: Configurations of the random search, the given one included.
        l2: As in ``hyper_deep``.
        label_smoothing: As in ``hyper_deep``.
        dropout: As in ``hyper_deep``.
        learning_rate: As in ``hyper_deep``.
    """
    grid = HyperGrid(
        build_network,
        train,
        validation,
        num_members=num_members,
        fit=fit,
        seed=seed,
        device=device,
        progress=progress,
        each=each,
        num_candidates=num_candidates,
        l2=l2,
        label_smoothing=label_smoothing,
        dropout=dropout,
        learning_rate=learning_rate,
    )
    return grid.fixed_init_hyper()


def _log_probs(network: nn.Module, data: ImageData, device: torch.device | str) -> Tensor:
    """Of every image, ``(batch, classes)``, on the CPU."""
    with evaluating(network):
        logits = [network(channels_last(images)).float() for images, _ in data.batches(512, device)]
    return torch.cat(logits).double().log_softmax(dim=-1).cpu()
