"""Uncertainty of an ensemble: pure functions of its members' log-probabilities and the labels.

``log_probs`` is ``(members, batch, classes)``, natural logarithms, as ``log_softmax`` gives them; ``labels``
is ``(batch,)`` of class ids. The ensemble's prediction is the mean of the members' *probabilities*; a member's
own metric is that of ``log_probs[m : m + 1]``. Half-precision input is computed in float32. A metric of no
examples is NaN, and so is one of predictions with a NaN in them.

Sources: Uncertainty Baselines and robustness_metrics (NLL, Brier, ECE); Mukhoti et al. 2020 (equal-mass bins);
Kull et al. 2019 (class-wise ECE); Geifman, Uziel & El-Yaniv 2019 (AURC); Houlsby et al. 2011 (mutual
information).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lifelong_ens.metrics.inputs import at_least_float32, check_labels, check_log_probs, nan_of


def ensemble_log_probs(log_probs: Tensor) -> Tensor:
    """``log p(y|x) = logsumexp_m log p_m(y|x) - log M``, shape ``(batch, classes)``."""
    return torch.logsumexp(check_log_probs(log_probs), dim=0) - math.log(log_probs.shape[0])


def accuracy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """The share of examples whose most probable class is the label, in [0, 1], higher is better; a scalar."""
    confidence, correct = _answers(log_probs, labels)
    return nan_of(correct.mean(), confidence)


def nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood, ``-(1/n) sum_i log p(y_i|x_i)``, nats, lower is better; a scalar."""
    mean = ensemble_log_probs(log_probs)
    check_labels(mean, labels)
    return -mean.gather(1, labels.long()[:, None]).mean()


def brier(log_probs: Tensor, labels: Tensor) -> Tensor:
    """``(1/n) sum_i sum_c (p_c(x_i) - [y_i = c])^2``, in [0, 2], lower is better; a scalar."""
    probs = ensemble_log_probs(log_probs).exp()
    check_labels(probs, labels)
    target = torch.nn.functional.one_hot(labels.long(), probs.shape[1]).to(probs.dtype)
    return (probs - target).square().sum(dim=1).mean()


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: one entry per bin of confidence, each tensor of the shape ``(num_bins,)``.

    Attributes:
        count: Examples in the bin.
        confidence: Their mean confidence; NaN for an empty bin.
        accuracy: The share of them that is right; NaN for an empty bin.
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability(log_probs: Tensor, labels: Tensor, num_bins: int = 15) -> Reliability:
    """Confidence and accuracy in bins of equal width over the confidence ``max_c p_c``.

    Each bin is open below and closed above: (0, 1/15], (1/15, 2/15], ...
    """
    confidence, correct = _answers(log_probs, labels)
    bins = _bins(confidence, num_bins)
    empty = confidence.new_zeros(num_bins)
    count = empty.index_add(0, bins, torch.ones_like(confidence))
    return Reliability(
        count.long(),
        empty.index_add(0, bins, confidence) / count,
        empty.index_add(0, bins, correct) / count,
    )


def reliability_lists(log_probs: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """``reliability`` (15 bins) as a record holds it: ``count``, ``confidence`` and ``accuracy`` of every bin."""
    bins = reliability(log_probs, labels)
    return {name: getattr(bins, name).tolist() for name in ("count", "confidence", "accuracy")}


def expected_calibration_error(log_probs: Tensor, labels: Tensor, num_bins: int = 15) -> Tensor:
    """``sum_b (n_b/n) |accuracy_b - confidence_b|``, in [0, 1], lower is better; a scalar.

    The bins are those of ``reliability``.
    """
    bins = reliability(log_probs, labels, num_bins)
    gaps = torch.where(bins.count > 0, bins.count * (bins.accuracy - bins.confidence).abs(), 0)
    return gaps.sum() / bins.count.sum()


def adaptive_calibration_error(log_probs: Tensor, labels: Tensor, num_bins: int = 15) -> Tensor:
    """``sum_b (n_b/n) |accuracy_b - confidence_b|`` over bins of equal mass, in [0, 1], lower is better; a scalar.

    The examples in order of their confidence are cut into ``num_bins`` runs whose lengths differ by one at most;
    examples of equal confidence share their mean correctness, so that their order does not matter. Of the most
    probable class only, as in Mukhoti et al. 2020; the ACE of Nixon et al. 2019 averages over all classes.
    """
    confidence, correct = _answers(log_probs, labels)
    order = confidence.argsort()
    gap = (_mean_of_equals(correct, confidence) - confidence)[order]
    runs = torch.arange(num_bins, device=gap.device).repeat_interleave(
        torch.tensor([len(run) for run in gap.tensor_split(num_bins)], device=gap.device)
    )
    return gap.new_zeros(num_bins).index_add(0, runs, gap).abs().sum() / gap.numel()


def classwise_calibration_error(log_probs: Tensor, labels: Tensor, num_bins: int = 15) -> Tensor:
    """``(1/C) sum_c sum_b (n_bc/n) |frequency_bc - mean p_bc|``, in [0, 1], lower is better; a scalar.

    For every class bins of equal width over *its* probability for all examples, whatever class is predicted: the
    class-wise ECE of Kull et al. 2019, which is the static calibration error of Nixon et al. 2019.
    """
    probs = ensemble_log_probs(log_probs).exp()
    check_labels(probs, labels)
    num_examples, num_classes = probs.shape
    target = torch.nn.functional.one_hot(labels.long(), num_classes)
    cells = _bins(probs, num_bins) + num_bins * torch.arange(num_classes, device=probs.device)
    gap = probs.new_zeros(num_classes * num_bins).index_add(0, cells.flatten(), (target - probs).flatten())
    return gap.abs().sum() / (num_examples * num_classes)


def area_under_risk_coverage(log_probs: Tensor, labels: Tensor) -> Tensor:
    """AURC, ``(1/n) sum_k (error rate of the k most confident examples)``, in [0, 1], lower is better; a scalar.

    Selective prediction by the confidence ``max_c p_c``; Geifman, Uziel & El-Yaniv 2019. Examples of equal
    confidence count with their mean error, which is the mean over all orders of them.
    """
    confidence, correct = _answers(log_probs, labels)
    errors = _mean_of_equals(1 - correct, confidence)[confidence.argsort(descending=True)]
    kept = torch.arange(1, len(errors) + 1, device=errors.device)
    return nan_of((errors.cumsum(0) / kept).mean(), confidence)


def calibration(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """``nll``, ``ece`` (15 bins) and ``brier`` of one set of predictions."""
    return {
        "nll": float(nll(log_probs, labels)),
        "ece": float(expected_calibration_error(log_probs, labels)),
        "brier": float(brier(log_probs, labels)),
    }


def pooled(predictions: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Predictions of several tasks as one set: log-probabilities ``(1, batch, classes)`` and labels ``(batch,)``.

    Args:
        predictions: For every task log-probabilities ``(members, batch, classes)`` and labels; a task of fewer classes
            than another gives those that it lacks no probability.
    """
    parts = [ensemble_log_probs(log_probs) for log_probs, _ in predictions]
    width = max(part.shape[1] for part in parts)
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in parts]
    return torch.cat(padded).unsqueeze(0), torch.cat([labels for _, labels in predictions])


def predictive_entropy(log_probs: Tensor) -> Tensor:
    """Entropy of the mean prediction, ``-sum_c p_c log p_c``, nats, in [0, log classes]; ``(batch,)``."""
    return _entropy(ensemble_log_probs(log_probs))


def mutual_information(log_probs: Tensor) -> Tensor:
    """``H[mean_m p_m] - mean_m H[p_m]``, nats, in [0, log members], 0 where all agree; ``(batch,)``."""
    members = _entropy(at_least_float32(log_probs)).mean(dim=0)
    return (predictive_entropy(log_probs) - members).clamp_min(0)


TaskInference = Literal["entropy", "max_probability"]


def task_certainty(log_probs: Tensor, classes: Tensor, rule: TaskInference) -> Tensor:
    """How sure each task is of each image, ``(tasks, batch)``; where the task is not known, the surest is believed.

    Args:
        log_probs: ``(tasks, batch, classes)``, padded with -inf where a task has fewer classes.
        classes: How many classes each task has, ``(tasks,)``.
        rule: ``entropy``: minus the entropy relative to that of a uniform prediction over the task's classes;
            ``max_probability``: the logarithm of the largest probability.
    """
    if rule == "max_probability":
        return log_probs.max(dim=-1).values
    # a task of one class is always sure, and says nothing
    uniform = classes.clamp(min=2).log().unsqueeze(1)
    return -_entropy(log_probs) / uniform


def _entropy(log_probs: Tensor) -> Tensor:
    """``-sum_c p_c log p_c`` over the last dimension; a class of probability 0 adds 0."""
    return torch.special.entr(log_probs.exp()).sum(dim=-1)


def _answers(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The confidence ``max_c p_c`` of every example and whether it is right, 0.0 or 1.0; both ``(batch,)``."""
    confidence, predicted = ensemble_log_probs(log_probs).exp().max(dim=1)
    check_labels(confidence, labels)
    return confidence, (predicted == labels).to(confidence.dtype)


def _bins(probs: Tensor, num_bins: int) -> Tensor:
    """The bin of equal width, open below and closed above, that each probability falls in; 0 is in the first."""
    return ((probs * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)


def _mean_of_equals(values: Tensor, keys: Tensor) -> Tensor:
    """Every value replaced by the mean over the examples that share its key; both ``(batch,)``."""
    _, group, size = keys.unique(return_inverse=True, return_counts=True)
    return (values.new_zeros(len(size)).index_add(0, group, values) / size)[group]
