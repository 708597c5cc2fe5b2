"""Which units a member gets: scales of units that are kept apart, and the units whose scales matter most.

Source: Structured Ensembles (Pomponi, Scardapane and Uncini, Neural Networks 144, 2021; the authors' code
StructuredEnsemble).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor


def member_of_rows(num_rows: int, num_members: int, device: torch.device | None = None) -> Tensor:
    """Which member each row of a batch belongs to while scales are learnt, ``(rows,)``.

    The first ``rows // members`` rows are the first member's, as many the next one's, and so on; what is left over is
    the first one's.
    """
    rows, block = torch.arange(num_rows, device=device), num_rows // num_members
    return torch.where(rows < block * num_members, rows // max(block, 1), 0)


def mean_importance(
    losses: Iterable[Tensor], scales: Mapping[str, Tensor], total: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """``|dL / ds|`` of every scale, by layer and in its shape, averaged over the losses of batches.

    Args:
        losses: Of batches, or each a part of a batch's that is computed here.
        scales: By layer.
        total: The sum of what is computed here and elsewhere.
    """
    totals = {name: torch.zeros_like(scale) for name, scale in scales.items()}
    count = 0
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(scales.values()), materialize_grads=True)
        for sums, gradient in zip(totals.values(), gradients, strict=True):
            sums += (gradient if total is None else total(gradient)).abs()
        count += 1
    return {name: sums.detach() / max(count, 1) for name, sums in totals.items()}


def divergence(scales: Sequence[Tensor]) -> Tensor:
    """How different members' scales ``(members, units)`` are: the sum of ``discrepancy`` over layers and pairs."""
    pairs = (
        discrepancy(layer[one], layer[other])
        for layer in scales
        for one, other in combinations(range(len(layer)), 2)
    )
    return torch.stack(list(pairs)).sum()


def discrepancy(a: Tensor, b: Tensor) -> Tensor:
    """``mean k(a, a) + mean k(b, b) - 2 mean k(a, b)`` of two vectors of n scales, after the maximum mean discrepancy.

    Source: the authors' code StructuredEnsemble, where ``k(a, b)_i = exp(-mean_j (a_i - b_j)^2 / n)``: squares are
    averaged before the exponential. So this is no discrepancy of distributions, and it can fall below zero, where
    the code's penalty would reward likeness; ours is one over its absolute value.
    """

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        # less 1, which cancels in the sum: it would take the digits of the small differences
        squares = (one - other.mean()).square() + other.var(correction=0)
        return torch.expm1(-squares / len(one)).mean()

    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)


def choose(
    importance: Mapping[str, Tensor],
    free: Mapping[str, Tensor],
    quantile: float,
    *,
    scope: str = "local",
    pruning: str = "hard",
) -> dict[str, Tensor]:
    """Free units whose importance reaches the quantile of those it is compared with.

    ``hard`` compares a unit with the free ones, ``soft`` with all; ``local`` within its layer, ``global`` over all
    layers (the code divides by the sum of all importances before, which changes no order). Units of equal importance
    stand in the order of their index, where a threshold would take all of them: dead units all have importance 0.
    While a layer has free units it gives at least its most important one.

    Args:
        importance: By layer, ``(units,)``.
        free: By layer, ``(units,)`` booleans.
        quantile: Share of what is compared that is left out, in [0, 1).
        scope: ``local`` or ``global``.
        pruning: ``hard`` or ``soft``.

    Returns:
        By layer, ``(units,)`` booleans, all of them free units.
    """
    groups = [[name] for name in importance] if scope == "local" else [list(importance)]
    chosen: dict[str, Tensor] = {}
    for names in groups:
        score = torch.cat([importance[name] for name in names])
        is_free = torch.cat([free[name] for name in names])
        compared = is_free if pruning == "hard" else torch.ones_like(is_free)
        # ranks from 0 among what is compared; the others stand before them
        order = torch.where(compared, score, -torch.inf).argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - int((~compared).sum())
        reaches = is_free & (rank >= quantile * (int(compared.sum()) - 1) - 1e-9)
        parts = reaches.split([len(importance[name]) for name in names])
        chosen.update(zip(names, parts, strict=True))
    for name, units in chosen.items():
        if free[name].any() and not units.any():
            best = torch.where(free[name], importance[name], -torch.inf).argmax()
            chosen[name] = units.index_fill(0, best, True)
    return chosen
