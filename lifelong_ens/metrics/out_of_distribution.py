"""Out-of-distribution detection: exact rank statistics of scores.

A score is high where an example looks out-of-distribution; out-of-distribution examples are the positives. ``inside``
and ``outside`` are the scores of the two kinds of examples, both of shape ``(examples,)``, in any order. Ties are
handled exactly, nothing is interpolated and no grid of thresholds is laid. A metric is NaN where one of the two is
empty or holds a NaN.

Sources: Hendrycks & Gimpel 2017 (maximum probability, AUROC, AUPR); Liang, Li & Srikant 2018 (FPR at 95 % TPR), who
take in-distribution as positive; the orientation here is that of Uncertainty Baselines.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lifelong_ens.metrics.inputs import at_least_float32, nan_of
from lifelong_ens.metrics.uncertainty import ensemble_log_probs, mutual_information, predictive_entropy

Score = Literal["max_probability", "entropy", "mutual_information"]


def ood_scores(log_probs: Tensor, score: Score = "max_probability") -> Tensor:
    """How much each example looks out-of-distribution, ``(batch,)``.

    Args:
        log_probs: ``(members, batch, classes)``.
        score: ``max_probability``: ``1 - max_c p_c`` of the mean prediction, in [0, 1]; ``entropy`` of the mean
            prediction, nats; ``mutual_information`` of prediction and member, nats, 0 for a single member.
    """
    if score == "entropy":
        return predictive_entropy(log_probs)
    if score == "mutual_information":
        return mutual_information(log_probs)
    if score != "max_probability":
        raise ValueError(f"score: expected max_probability, entropy or mutual_information, got {score!r}")
    # 1 - exp(x) as one function keeps apart the scores of very sure examples
    return -torch.expm1(ensemble_log_probs(log_probs).amax(dim=1))


def auroc(inside: Tensor, outside: Tensor) -> Tensor:
    """``P(outside > inside) + P(outside = inside) / 2``, in [0, 1], 0.5 for chance, higher is better; a scalar.

    The area under the ROC curve as the Mann-Whitney statistic.
    """
    inside, outside = _sorted(inside), _sorted(outside)
    below = torch.searchsorted(inside, outside, right=False)
    not_above = torch.searchsorted(inside, outside, right=True)
    halves = (below + not_above).sum()  # an integer: exact for any number of examples
    return _checked(halves.double() / (2 * len(inside) * len(outside) or float("nan")), inside, outside)


def aupr(inside: Tensor, outside: Tensor) -> Tensor:
    """Average precision: the mean over outside examples of the precision at their score, in (0, 1]; a scalar.

    Higher is better; chance gives the share of outside examples, so that it compares only at equal shares. The sum
    ``sum_k (recall_k - recall_{k-1}) precision_k`` over the distinct scores, without interpolation.
    """
    inside, outside = _sorted(inside), _sorted(outside)
    found = len(outside) - torch.searchsorted(outside, outside, right=False)
    false = len(inside) - torch.searchsorted(inside, outside, right=False)
    precision = found.double() / (found + false)
    return _checked(precision.mean(), inside, outside)


def fpr_at_95_tpr(inside: Tensor, outside: Tensor) -> Tensor:
    """The share of inside examples taken for outside where at least 95 % of the outside ones are found.

    In [0, 1], lower is better; a scalar. The threshold is the highest that finds 95 %; a score equal to it counts
    as found.
    """
    inside, outside = _sorted(inside), _sorted(outside)
    if not len(inside) or not len(outside):
        return inside.new_tensor(float("nan"), dtype=torch.float64)
    missed = len(outside) // 20  # at most 5 %, in integers
    return _checked((inside >= outside[missed]).double().mean(), inside, outside)


def _sorted(scores: Tensor) -> Tensor:
    if scores.dim() != 1:
        raise ValueError(f"scores: expected (examples,), got {tuple(scores.shape)}")
    return at_least_float32(scores).sort().values


def _checked(value: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """``value``, or NaN where nothing can be said."""
    if not len(inside) or not len(outside):
        return value.new_tensor(float("nan"))
    return nan_of(nan_of(value, inside), outside)
