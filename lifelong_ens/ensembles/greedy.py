"""Greedy selection of an ensemble from a library of trained candidates (Caruana et al., ICML 2004)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lifelong_ens.errors import InputError

# nats; without it a first choice that no longer helps would be diluted by ever more picks, each a little better
SMALLEST_GAIN = 1e-6


def greedy_selection(log_probs: Tensor, labels: Tensor, num_members: int) -> Tensor:
    """How often each candidate is picked, ``(candidates,)``, int64; the counts over their sum are mixture weights.

    Each pick is the candidate that, added to those picked before, gives the mean of probabilities the lowest negative
    log-likelihood, and the same one may be picked again. Picking ends when ``num_members`` different ones are there,
    or when no candidate lowers the likelihood's negative logarithm by ``SMALLEST_GAIN`` nats. The first pick is the
    best single candidate, the first of several equally good ones.

    Source: ``hyper_ens`` in Wenzel et al., NeurIPS 2020, section 3, which takes any gain, however small.

    Args:
        log_probs: Of every candidate on validation images, ``(candidates, batch, classes)``. A candidate with NaN is
            never picked.
        labels: ``(batch,)``.
        num_members: How many different candidates at most.

    Raises:
        InputError: Fewer than one member asked for, or no candidate has a finite likelihood.
    """
    if num_members < 1:
        raise InputError(f"an ensemble has at least one member, not {num_members}.")
    if log_probs.dim() != 3 or labels.shape != log_probs.shape[1:2] or not len(labels):
        raise ValueError(
            f"expected log_probs (candidates, batch, classes) and labels (batch,), not {tuple(log_probs.shape)} "
            f"and {tuple(labels.shape)}"
        )
    # the likelihood reads nothing but the label's probability; a sum in logarithms cannot underflow
    of_label = log_probs.double()[:, torch.arange(len(labels), device=labels.device), labels]
    counts = torch.zeros(len(log_probs), dtype=torch.long)
    total = torch.full_like(of_label[0], -math.inf)
    best, picks = math.inf, 0
    while int((counts > 0).sum()) < num_members:
        sums = torch.logaddexp(total, of_label)
        losses = (math.log(picks + 1) - sums.mean(dim=1)).nan_to_num(nan=math.inf)
        pick = int(losses.argmin())
        if not float(losses[pick]) < best - SMALLEST_GAIN:
            break
        best, total, picks = float(losses[pick]), sums[pick], picks + 1
        counts[pick] += 1
    if not picks:
        raise InputError(
            "no candidate gives the validation labels a probability above 0; check the training."
        )
    return counts
