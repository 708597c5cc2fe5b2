"""Robustness to corruptions: metrics of every type and severity, and their means (cAcc, cNLL, cECE).

Sources: Hendrycks & Dietterich 2019 (the benchmark); Uncertainty Baselines (plain means over types and severities, not
relative to a reference network as the mCE of the former).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lifelong_ens.metrics.uncertainty import accuracy, calibration


@dataclass(frozen=True)
class CorruptedCell:
    """How an ensemble does on one type and severity of corruption.

    Attributes:
        corruption: Its name.
        severity: 1 to 5.
        accuracy: Of the mean prediction, in [0, 1].
        nll: Negative log-likelihood, nats.
        ece: Expected calibration error in 15 bins, in [0, 1].
        brier: In [0, 2].
    """

    corruption: str
    severity: int
    accuracy: float
    nll: float
    ece: float
    brier: float


def corrupted_cells(predictions: Iterable[tuple[str, int, Tensor, Tensor]]) -> list[CorruptedCell]:
    """The metrics of every cell.

    Args:
        predictions: Name, severity, log-probabilities ``(members, batch, classes)`` and labels ``(batch,)``, one cell
            at a time; a generator keeps one cell's predictions in memory.
    """
    return [
        CorruptedCell(name, severity, float(accuracy(log_probs, labels)), **calibration(log_probs, labels))
        for name, severity, log_probs, labels in predictions
    ]


def corrupted_means(cells: Sequence[CorruptedCell]) -> dict[str, float]:
    """``accuracy``, ``nll``, ``ece`` and ``brier`` (cAcc, cNLL, cECE), each the mean over the cells.

    NaN of no cells.

    Raises:
        ValueError: Where a severity is missing for some of the types, or a cell comes twice: the mean would be another
            quantity.
    """
    severities = {cell.severity for cell in cells}
    keys = {(cell.corruption, cell.severity) for cell in cells}
    if not len(cells) == len(keys) == len({cell.corruption for cell in cells}) * len(severities):
        raise ValueError("cells: expected each severity once for every corruption")
    return {
        name: sum(getattr(cell, name) for cell in cells) / (len(cells) or float("nan"))
        for name in ("accuracy", "nll", "ece", "brier")
    }
