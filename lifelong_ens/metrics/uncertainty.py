"""Uncertainty of an ensemble: pure functions of its members' log-probabilities and the labels.

``log_probs`` is ``(members, batch, classes)``, natural logarithms, as ``log_softmax`` gives them; ``labels``
is ``(batch,)`` of class ids. The ensemble's prediction is the mean of the members' *probabilities*.
Half-precision input is computed in float32. A metric of no examples is NaN.

Sources: Uncertainty Baselines and robustness_metrics (NLL, Brier, ECE); Houlsby et al. 2011 (mutual
information).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def ensemble_log_probs(log_probs: Tensor) -> Tensor:
    """``log p(y|x) = logsumexp_m log p_m(y|x) - log M``, shape ``(batch, classes)``."""
    if log_probs.dim() != 3 or log_probs.shape[0] == 0:
        raise ValueError(f"log_probs: expected (members, batch, classes), got {tuple(log_probs.shape)}")
    return torch.logsumexp(_at_least_float32(log_probs), dim=0) - math.log(log_probs.shape[0])


def nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood, ``-(1/n) sum_i log p(y_i|x_i)``, nats, lower is better; a scalar."""
    mean = ensemble_log_probs(log_probs)
    _check_labels(mean, labels)
    return -mean.gather(1, labels.long()[:, None]).mean()


def brier(log_probs: Tensor, labels: Tensor) -> Tensor:
    """``(1/n) sum_i sum_c (p_c(x_i) - [y_i = c])^2``, in [0, 2], lower is better; a scalar."""
    probs = ensemble_log_probs(log_probs).exp()
    _check_labels(probs, labels)
    target = torch.nn.functional.one_hot(labels.long(), probs.shape[1]).to(probs.dtype)
    return (probs - target).square().sum(dim=1).mean()


def expected_calibration_error(log_probs: Tensor, labels: Tensor, num_bins: int = 15) -> Tensor:
    """``sum_b (n_b/n) |accuracy_b - confidence_b|``, in [0, 1], lower is better; a scalar.

    Bins of equal width over the confidence ``max_c p_c``, each open below and closed above: (0, 1/15], ...
    """
    confidence, predicted = ensemble_log_probs(log_probs).exp().max(dim=1)
    _check_labels(confidence[:, None], labels)
    correct = (predicted == labels).to(confidence.dtype)
    bins = ((confidence * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    gap = confidence.new_zeros(num_bins).index_add(0, bins, correct - confidence)
    return gap.abs().sum() / confidence.numel()


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
    members = _entropy(_at_least_float32(log_probs)).mean(dim=0)
    return (predictive_entropy(log_probs) - members).clamp_min(0)


def disagreement(log_probs: Tensor) -> Tensor:
    """The share of examples on which two members predict different classes; a scalar in [0, 1].

    The mean over unordered pairs of members; NaN for a single member.
    """
    num_members, num_examples, num_classes = log_probs.shape
    votes = torch.nn.functional.one_hot(log_probs.argmax(dim=2), num_classes).sum(dim=0)
    agreeing = (votes * (votes - 1)).sum().to(torch.float32)
    ordered_pairs = num_members * (num_members - 1) * num_examples
    return 1 - agreeing / ordered_pairs if ordered_pairs else agreeing.new_tensor(float("nan"))


def _entropy(log_probs: Tensor) -> Tensor:
    """``-sum_c p_c log p_c`` over the last dimension; a class of probability 0 adds 0."""
    return torch.special.entr(log_probs.exp()).sum(dim=-1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_labels(predictions: Tensor, labels: Tensor) -> None:
    if labels.shape != predictions.shape[:1]:
        raise ValueError(f"labels: expected {tuple(predictions.shape[:1])}, got {tuple(labels.shape)}")
