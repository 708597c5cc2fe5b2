"""Diversity of an ensemble: how much its members differ, as pure functions of their log-probabilities.

``log_probs`` is ``(members, batch, classes)`` as in ``lifelong_ens.metrics.uncertainty``. A measure over pairs of
members is NaN for a single member, and one of no examples is NaN. None of them walks over the pairs: all are
moments over the members, so that memory grows with the members and not with their square.

Sources: robustness_metrics (disagreement, KL, cosine); Fort, Hu & Lakshminarayanan 2019 (normalised disagreement).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_ens.metrics.inputs import check_labels, check_log_probs, nan_of
from lifelong_ens.metrics.uncertainty import ensemble_log_probs, predictive_entropy


def disagreement(log_probs: Tensor) -> Tensor:
    """The share of examples on which two members predict different classes; a scalar in [0, 1].

    The mean over unordered pairs of members; NaN for a single member.
    """
    log_probs = check_log_probs(log_probs)
    num_members, num_examples, num_classes = log_probs.shape
    votes = torch.zeros(num_examples, num_classes, dtype=torch.long, device=log_probs.device)
    for predicted in log_probs.argmax(dim=2):
        votes += torch.nn.functional.one_hot(predicted, num_classes)
    agreeing = (votes * (votes - 1)).sum().to(torch.float32)
    ordered_pairs = num_members * (num_members - 1) * num_examples
    share = 1 - agreeing / ordered_pairs if ordered_pairs else agreeing.new_tensor(float("nan"))
    return nan_of(share, log_probs)


def normalised_disagreement(log_probs: Tensor, labels: Tensor) -> Tensor:
    """``disagreement / (mean error rate of the members)``, higher is more diverse; a scalar in [0, 2].

    The disagreement that members of such errors can have is bounded by their errors; the quotient compares
    ensembles of different accuracy. NaN where no member errs: they agree everywhere, and 0/0 says nothing. Fort et
    al. 2019 divide by the error rate of one network; here it is the mean over the members.
    """
    return disagreement(log_probs) / _errors(log_probs, labels).mean()


def kl_diversity(log_probs: Tensor) -> Tensor:
    """``KL(p_i || p_j) = sum_c p_i log(p_i / p_j)``, mean over ordered pairs and examples, nats; a scalar >= 0.

    Both directions of every pair count; robustness_metrics takes one of them. Infinite where a member excludes a
    class that another does not. Computed as the sum over classes of the sample covariance of ``p`` and ``log p``
    over the members, which is the same number.
    """
    log_probs = check_log_probs(log_probs)
    probs = log_probs.exp()
    mean, mean_log = probs.mean(dim=0), log_probs.mean(dim=0)
    products = ((probs - mean) * (log_probs - mean_log)).sum(dim=0)
    excluded = torch.where(mean > 0, torch.inf, 0.0)  # by one member, or by all
    return torch.where(mean_log == -torch.inf, excluded, products).sum(dim=1).mean() / _others(log_probs)


def cosine_diversity(log_probs: Tensor) -> Tensor:
    """``1 - cos(p_i, p_j)``, mean over unordered pairs and examples, higher is more diverse; a scalar in [0, 1].

    robustness_metrics reports the cosine similarity itself. Computed as the sample variance over the members of
    the probability vectors scaled to length 1, which is the same number.
    """
    probs = check_log_probs(log_probs).exp()
    directions = probs / probs.norm(dim=2, keepdim=True)
    return (directions - directions.mean(dim=0)).square().sum(dim=(0, 2)).mean() / _others(probs)


def error_correlation(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Pearson correlation of ``[member i errs]`` and ``[member j errs]``, mean over unordered pairs; in [-1, 1].

    1: the members err on the same examples; 0: independently. Lower is better for an ensemble of equally good
    members. NaN where a member errs on no example or on all: its correlation is not defined.
    """
    errors = _errors(log_probs, labels)
    centred = errors - errors.mean(dim=1, keepdim=True)
    units = centred / centred.square().mean(dim=1, keepdim=True).sqrt()
    total = units.sum(dim=0).square().mean() - len(units)  # over ordered pairs
    return total / (len(units) * _others(units))


def collapsed(log_probs: Tensor, share: float = 0.01) -> bool:
    """Whether the members are so nearly identical that they are one network in all but cost.

    By the ensemble's own account averaging lowers the NLL by ``mean_m KL(p || p_m)`` nats below that of its members
    (labels drawn from its prediction ``p``), and the NLL it then has is the entropy of ``p``. Collapsed is an
    ensemble whose gain is at most ``share`` of that entropy. The reason for 1 %: BatchEnsemble and deep ensembles in
    the CIFAR tables of Uncertainty Baselines have an NLL lower than one network's by 14 % and more, so that an
    ensemble below a tenth of that is none; and a share, because a sure network has few nats left to gain. False for a
    single member, for no examples and for NaN.
    """
    log_probs = check_log_probs(log_probs)
    if log_probs.shape[0] == 1 or log_probs.shape[1] == 0:
        return False
    members = (
        log_probs.double()
    )  # the gain of nearly identical members is a difference of nearly equal numbers
    mean = ensemble_log_probs(members)
    gain = mean.exp() * (mean - members.mean(dim=0))
    gain = torch.where(mean == -torch.inf, 0.0, gain).sum(dim=1).mean()
    return bool(gain <= share * predictive_entropy(members).mean())


def _errors(log_probs: Tensor, labels: Tensor) -> Tensor:
    """``[member m errs on example i]``, ``(members, batch)`` of 0.0, 1.0 or, for predictions with a NaN, NaN."""
    log_probs = check_log_probs(log_probs)
    check_labels(log_probs[0], labels)
    confidence, predicted = log_probs.max(dim=2)
    return torch.where(confidence.isnan(), confidence, (predicted != labels).to(confidence.dtype))


def _others(members: Tensor) -> float:
    """How many other members each has; NaN for a single member, which makes a mean over pairs NaN."""
    return len(members) - 1 if len(members) > 1 else float("nan")
