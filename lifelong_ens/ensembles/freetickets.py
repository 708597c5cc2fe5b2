"""Ensembles of sparse networks: FreeTickets (DST, EDST), and the baselines whose masks stand still.

Source: Liu et al., ICLR 2022 (arXiv 2106.14568), and their released code. Members are separate networks with zeros; a
mask is its network's zeros, stored as bits. The defaults are for short trainings; published are 250 epochs of
``fit``, ``init="plain"`` and the updates that ``MaskUpdates`` names.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.ensembles.ensemble import Ensemble, finished
from lifelong_ens.ensembles.separate import SeparateNetworks
from lifelong_ens.ensembles.sparse_training import MaskUpdates, SparseTraining
from lifelong_ens.ensembles.training import (
    BuildNetwork,
    Each,
    Progress,
    accuracy,
    new_network,
    run_all,
    silent,
    train_apart,
    train_network,
)
from lifelong_ens.errors import InputError
from lifelong_ens.layers.sparse import Init, Masks, checked_sparsity, maskable
from lifelong_ens.training.data import ImageData
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.seeding import derived_seed


def fit_dst(
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None = None,
    *,
    num_members: int = 3,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    each: Each = map,
    sparsity: float = 0.8,
    updates: MaskUpdates | None = None,
    init: Init = "scaled",
) -> Ensemble:
    """A DST ensemble: sparse networks trained apart, each with random ERK masks that move while it learns.

    Every member has the schedule of ``fit``, as those of a deep ensemble have (the release: tenths at a half and three
    quarters of the epochs).

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
        sparsity: Share of linear and convolution weights that is zero.
        updates: When and how masks move: ``updates.growth`` gradient or random, ``.every`` so many steps, ``.rate``,
            ``.decay`` constant or cosine, ``.until``, ``.grown_momentum`` zero or kept; see ``MaskUpdates``.
        init: ``scaled`` divides the weights that a mask leaves by the root of their layer's density, so that outputs
            vary as much as those of a dense layer; ``plain`` does not (the release, whose networks have norms).
    """
    return _sparse_from_scratch(
        "dst",
        build_network,
        train,
        validation,
        seeds=_seeds(seed, num_members),
        fit=fit or Fit(),
        device=device,
        progress=progress,
        each=each,
        sparsity=sparsity,
        init=init,
        updates=updates or MaskUpdates(),
    )


def fit_static_sparse(
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None = None,
    *,
    num_members: int = 3,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    each: Each = map,
    sparsity: float = 0.8,
    init: Init = "scaled",
) -> Ensemble:
    """Sparse networks trained apart under random ERK masks that never move.

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
        sparsity: Share of linear and convolution weights that is zero.
        init: ``scaled`` divides the weights that a mask leaves by the root of their layer's density, so that outputs
            vary as much as those of a dense layer; ``plain`` does not (the release, whose networks have norms).
    """
    return _sparse_from_scratch(
        "static_sparse",
        build_network,
        train,
        validation,
        seeds=_seeds(seed, num_members),
        fit=fit or Fit(),
        device=device,
        progress=progress,
        each=each,
        sparsity=sparsity,
        init=init,
        updates=None,
    )


def _sparse_from_scratch(
    method: str,
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None,
    *,
    seeds: list[int],
    fit: Fit,
    device: torch.device | str,
    progress: Progress,
    each: Each,
    sparsity: float,
    init: Init,
    updates: MaskUpdates | None,
) -> Ensemble:
    def train_one(member: int, meter: TrainingMeter) -> tuple[nn.Module, float]:
        seed = seeds[member]
        network = new_network(build_network, seed, device)
        masks = Masks.random(network, sparsity, torch.Generator().manual_seed(seed), init)
        run = SparseTraining(network, masks, updates, train, fit, seed=seed, meter=meter)
        run_all(run.training, validation, f"{method} {member + 1}/{len(seeds)}", progress)
        return network, run.flops_effective

    members, meter = train_apart(train_one, range(len(seeds)), each)
    networks, effective = [network for network, _ in members], sum(flops for _, flops in members)
    return _finished(networks, method, build_network, meter, len(seeds), effective)


def fit_edst(
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None = None,
    *,
    num_members: int = 3,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    sparsity: float = 0.8,
    updates: MaskUpdates | None = None,
    init: Init = "scaled",
    phases: tuple[float, float] = (0.6, 0.4),
    exploration_rate: float = 0.8,
) -> Ensemble:
    """An EDST ensemble: one sparse training that explores, and then leaves a member after each of its refinements.

    Exploration has the learning rate of ``fit``; a refinement a tenth of it, and a hundredth in its second half. Before
    each refinement but the first a large update of the masks throws the network out of its minimum. The schedule, the
    warm-up and the patience of ``fit`` are not used.

    Args:
        build_network: Makes one untrained classifier.
        train: Training images.
        validation: Where given, a member is its refinement's best epoch by accuracy on these, otherwise its last.
        num_members: How many refinements.
        fit: How a single dense network would be trained.
        seed: Of everything random.
        device: Where it is trained.
        progress: Hears of every step.
        sparsity: Share of linear and convolution weights that is zero.
        updates: When and how masks move, in exploration and in refinements; as in ``dst``.
        init: ``scaled`` divides the weights that a mask leaves by the root of their layer's density, so that outputs
            vary as much as those of a dense layer; ``plain`` does not (the release, whose networks have norms).
        phases: Epochs of the exploration and of each refinement, relative to those of ``fit``: the paper's 150 and 100
            of 250.
        exploration_rate: Share of connections that the large update replaces.
    """
    fit, updates = fit or Fit(), updates or MaskUpdates()
    _check_edst(num_members, phases, exploration_rate)
    explore, refine = (max(round(share * fit.epochs), 1) for share in phases)
    network, meter = new_network(build_network, seed, device), TrainingMeter()
    run = SparseTraining(
        network,
        Masks.random(network, sparsity, torch.Generator().manual_seed(seed), init),
        updates,
        train,
        replace(fit, schedule="constant", warmup_epochs=0.0),
        seed=seed,
        meter=meter,
        epochs=explore + num_members * refine,
    )
    step = progress("edst", run.training.epochs * run.training.steps_per_epoch)
    run.begin_phase(explore)
    run.training.run(explore, step)
    members: list[nn.Module] = []
    while len(members) < num_members:
        if members:
            run.move(exploration_rate)
        members.append(_refine(run, refine, fit.learning_rate, validation, step))
    return _finished(members, "edst", build_network, meter, 1, run.flops_effective)


def _refine(
    run: SparseTraining,
    epochs: int,
    learning_rate: float,
    validation: ImageData | None,
    step: Callable[[], object],
) -> nn.Module:
    """A copy of the network at its best or last epoch of a refinement."""
    run.begin_phase(epochs)
    best, member = -math.inf, run.training.network
    for epoch in range(epochs):
        for group in run.training.optimisation.optimizer.param_groups:
            group["lr"] = learning_rate * (0.1 if epoch < math.ceil(epochs / 2) else 0.01)
        run.training.run(1, step)
        if validation is None and epoch < epochs - 1:
            continue
        score = 0.0 if validation is None else accuracy(run.training.network, validation)
        # of equals the last: it has been trained for longer
        if score >= best:
            best, member = score, copy.deepcopy(run.training.network)
    return member


def fit_prune_finetune(
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None = None,
    *,
    num_members: int = 3,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    sparsity: float = 0.8,
    finetune_share: float = 1.0,
) -> Ensemble:
    """Dense networks trained apart, each pruned to its largest weights over all layers and trained on.

    The second training has a hundredth of the learning rate, constant, and masks that never move.

    Args:
        build_network: Makes one untrained classifier.
        train: Training images.
        validation: For early stopping alone.
        num_members: How many networks.
        fit: How each is trained before it is pruned.
        seed: Of the first network; the others have seeds that follow from it.
        device: Where they are trained.
        progress: Hears of every step.
        sparsity: Share of linear and convolution weights that is zero at last.
        finetune_share: Epochs of the second training, relative to those of ``fit``.
    """
    fit = fit or Fit()
    checked_sparsity(sparsity)
    if not finetune_share > 0:
        raise InputError(f"finetune_share is above 0, a share of the epochs, not {finetune_share}.")
    gentle = replace(fit, learning_rate=0.01 * fit.learning_rate, schedule="constant", warmup_epochs=0.0)
    epochs = max(round(finetune_share * fit.epochs), 1)
    meter, effective, networks = TrainingMeter(), 0.0, []
    for member, one_seed in enumerate(_seeds(seed, num_members)):
        network, before = new_network(build_network, one_seed, device), meter.flops
        maskable(network)
        label = f"prune_finetune {member + 1}/{num_members}"
        train_network(
            network, train, validation, fit, seed=one_seed, meter=meter, label=label, progress=progress
        )
        effective += meter.flops - before
        masks = Masks.by_magnitude(network, sparsity)
        run = SparseTraining(network, masks, None, train, gentle, seed=one_seed, meter=meter, epochs=epochs)
        run_all(run.training, validation, f"{label}, pruned", progress)
        effective += run.flops_effective
        networks.append(network)
    return _finished(networks, "prune_finetune", build_network, meter, num_members, effective)


def _seeds(seed: int, num_members: int) -> list[int]:
    return [derived_seed(seed, member) for member in range(num_members)]


def _finished(
    networks: list[nn.Module],
    method: str,
    build_network: BuildNetwork,
    meter: TrainingMeter,
    trainings: int,
    effective: float,
) -> Ensemble:
    ensemble = SeparateNetworks(networks, method)
    return finished(ensemble, build_network, meter, trainings, effective / meter.flops)


def _check_edst(num_members: int, phases: tuple[float, float], exploration_rate: float) -> None:
    if num_members < 1:
        raise InputError(f"an ensemble has at least one member, not {num_members}.")
    if len(phases) != 2 or not min(phases) > 0:
        raise InputError(f"phases are two shares of the epochs above 0, such as (0.6, 0.4), not {phases}.")
    if not 0 < exploration_rate < 1:
        raise InputError(
            f"exploration_rate is between 0 and 1, the share of connections replaced, not {exploration_rate}."
        )
