"""Temperature scaling: one number, fitted on validation, that corrects how sure a classifier is.

``log_probs`` is ``(batch, classes)``, natural logarithms. For an ensemble it is the logarithm of the *mean*
probability, ``ensemble_log_probs``: members are averaged first and the average is calibrated, as Rahaman & Thiery 2021
found better than to calibrate each member first.

Source: Guo, Pleiss, Sun & Weinberger 2017.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lifelong_ens.metrics.inputs import at_least_float32, check_labels

log = logging.getLogger(__name__)

BOUNDS = (0.01, 100.0)
_STEPS = 60  # halvings of the interval: beyond the precision of float64


def tempered(log_probs: Tensor, temperature: float) -> Tensor:
    """``log softmax(log p / T)``, ``(batch, classes)``; the predicted class stays, less sure for ``T > 1``."""
    return (at_least_float32(log_probs) / temperature).log_softmax(dim=-1)


def fit_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """The temperature ``T`` that minimises the NLL of ``softmax(log p / T)``, between 0.01 and 100.

    The NLL is convex in ``1/T``, so the minimum is where its derivative changes sign; found by bisection in float64. A
    minimum outside the bounds is at a bound, and a warning is logged: to be sure without limit pays where every
    validation example is right, and to be unsure without limit where the predictions are worse than chance. 1 where
    every temperature is as good (uniform predictions).

    Args:
        log_probs: ``(batch, classes)``; of an ensemble, of its mean probability.
        labels: ``(batch,)`` of class ids.

    Raises:
        ValueError: Of no examples; of predictions with a NaN, or with probability 0 for a label, whose NLL no
            temperature makes finite.
    """
    if log_probs.dim() != 2 or not len(log_probs):
        raise ValueError(f"log_probs: expected (batch, classes), at least one, got {tuple(log_probs.shape)}")
    check_labels(log_probs, labels)
    scores = log_probs.detach().to(torch.float64, copy=True)
    if not scores.gather(1, labels.long()[:, None]).isfinite().all() or scores.isnan().any():
        raise ValueError("log_probs: NaN, or probability 0 for a label: no temperature makes the NLL finite")
    scores -= scores.amax(dim=1, keepdim=True)  # the same softmax; uniform predictions become exactly 0
    coldest, warmest = 1 / BOUNDS[0], 1 / BOUNDS[1]
    if _slope(scores, labels, coldest) == _slope(scores, labels, warmest) == 0:
        return 1.0
    for inverse, temperature, sign in ((coldest, BOUNDS[0], -1), (warmest, BOUNDS[1], 1)):
        if sign * _slope(scores, labels, inverse) >= 0:
            log.warning("the best temperature lies beyond %g, which is taken", temperature)
            return temperature
    low, high = warmest, coldest
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5
        if _slope(scores, labels, middle) < 0:
            low = middle
        else:
            high = middle
    return (low * high) ** -0.5


def _slope(scores: Tensor, labels: Tensor, inverse: float) -> float:
    """The derivative of the NLL with respect to ``1/T``: the mean of ``sum_c softmax_c log p_c - log p_y``."""
    expected = (scores * inverse).softmax(dim=1) * torch.where(scores.isfinite(), scores, 0)
    return float((expected.sum(dim=1) - scores.gather(1, labels.long()[:, None])[:, 0]).mean())
