"""What a method's training and its ensemble will cost, found out by the first steps of every training."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from experiments.ensembles.data import Images
from experiments.ensembles.evaluation import COST_ROWS
from experiments.ensembles.run import EnsembleCell, fit_members
from experiments.estimate import MAY_STOP, Bound, Estimate, Steps, TaskCost
from experiments.run import Named
from lifelong_ens.ensembles import METHODS
from lifelong_ens.ensembles.ensemble import Ensemble
from lifelong_ens.ensembles.separate import SeparateNetworks
from lifelong_ens.errors import InputError

# of methods whose trainings all cost the same: how many there are, by the members and candidates asked for. One is
# looked at, and its network stands for all members
ALIKE: dict[str, Callable[[int, int], int]] = {
    "deep": lambda members, _: members,
    "dst": lambda members, _: members,
    "static_sparse": lambda members, _: members,
    "prune_finetune": lambda members, _: members,
    "fixed_init_hyper": lambda _, candidates: candidates,
    # all members picked are different configurations, each trained with all other seeds too
    "hyper_deep": lambda members, candidates: candidates + min(members, candidates) * (members - 1),
}
PICKED = Bound("≤", "members are picked on validation images, and may be fewer")
GROWN = Bound("≤", "connections that begin where no gradient comes stay zero, and are not stored")
GUESS = Bound("≈", "which layers lose their channels follows from what is learnt")
# warm steps of every phase, so that one of the tuning steps in between is among them
WARM_STEPS = 3


def estimate_ensemble(
    cell: EnsembleCell,
    function: Callable[..., Ensemble],
    build_network: Callable[[], nn.Module],
    images: Images,
    device: torch.device,
) -> Estimate:
    """What a cell will cost; nothing is measured on test images, and nothing is kept.

    The method trains as in a run, but makes only the first steps of every training; the rows of the others are
    counted. Parameters, bytes and FLOPs are those of the run, as far as they do not follow from what is learnt.

    Raises:
        InputError: The method is not one of ours, so that its steps cannot be left out.
        UnfitNetworkError: It cannot run on its network.
    """
    name, members = cell.method.name, cell.num_members
    if name not in METHODS:
        raise InputError("it is not one of our methods: only its run can tell")
    steps = Steps(device, bool(_option(cell, function, "compile")), least=WARM_STEPS)
    looked = _look(cell, function, build_network, images, device, steps)
    trainings, ensemble = 1, looked
    if name in ALIKE and isinstance(looked, SeparateNetworks):
        trainings = ALIKE[name](members, _option(cell, function, "num_candidates") or 0)
        kept = min(members, trainings)
        ensemble = SeparateNetworks((copy.deepcopy(looked.networks[0]) for _ in range(kept)), name)
        ensemble.eval().built_from = looked.built_from
        ensemble.to(device)
    x, _ = images.test.batch(torch.arange(COST_ROWS), device)
    stored = ensemble.cost(x)
    with tempfile.TemporaryDirectory() as folder:
        disk_bytes = ensemble.save(folder).stat().st_size
    seconds = looked.spent.seconds + steps.left_out
    size, cost = _bounds(cell, function)
    return Estimate(
        stored.parameters,
        stored.bytes,
        disk_bytes,
        stored.flops_forward,
        (TaskCost(trainings * looked.spent.flops, trainings * seconds),),
        (0,),
        size,
        cost,
    )


def _look(
    cell: EnsembleCell,
    function: Callable[..., Ensemble],
    build_network: Callable[[], nn.Module],
    images: Images,
    device: torch.device,
    steps: Steps,
) -> Ensemble:
    """What the method makes of the first steps; of members that are alike the first."""
    name, options = cell.method.name, {**cell.method.options}
    # what validation images say after a few steps stops nothing
    options.pop("patience", None)
    if name in ALIKE:
        cell = replace(cell, num_members=1)
        options |= {"num_candidates": 1} if "num_candidates" in inspect.signature(function).parameters else {}
    if name == "edst":
        # they would be asked after every epoch of a refinement, which is no part of what training costs
        images = replace(images, validation=images.validation.subset(torch.arange(1)))
    cell = replace(cell, fit=replace(cell.fit, patience=None), method=Named(name, options))
    return fit_members(cell, function, build_network, images, device, lambda label, total: steps)


def _bounds(cell: EnsembleCell, function: Callable[..., Ensemble]) -> tuple[Bound | None, Bound | None]:
    """How far size, and cost of training, can be trusted."""
    name = cell.method.name
    if name == "structured" and _option(cell, function, "scope") == "global":
        return GUESS, GUESS
    stops = MAY_STOP if _option(cell, function, "patience") is not None and name != "edst" else None
    if name in ("hyper_deep", "fixed_init_hyper"):
        return PICKED, PICKED if name == "hyper_deep" else stops
    return GROWN if name in ("dst", "edst") else None, stops


def _option(cell: EnsembleCell, function: Callable[..., Ensemble], name: str) -> Any:
    """An option as it was given to the method, or to all; else the method's default."""
    parameter = inspect.signature(function).parameters.get(name)
    default = getattr(cell.fit, name, None) if parameter is None else parameter.default
    return cell.method.options.get(name, default)
