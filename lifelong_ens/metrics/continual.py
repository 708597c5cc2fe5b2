"""Continual-learning metrics: pure functions of one accuracy matrix.

``R`` has the shape ``(T, T)``: ``R[i, j]`` is the accuracy in [0, 1] on task ``j`` after training task ``i``,
NaN where it was not measured. The equations count tasks from 1, as the papers do; the arrays count from 0. A
metric that needs an entry that was not measured, or more tasks than there are, is NaN: a mean over whatever
happens to be there would be another quantity under the same name.

Sources: Lopez-Paz & Ranzato 2017 (GEM), Chaudhry et al. 2018 and 2019 (A-GEM), Riemer et al. 2019 (MER),
Diaz-Rodriguez et al. 2018 ("Don't forget, there is more than forgetting").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Matrix = NDArray[np.float64]


def _matrix(R: ArrayLike) -> _Matrix:
    """``R`` as a square float array ``(T, T)`` with values in [0, 1] or NaN."""
    matrix = np.asarray(R, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(f"accuracy matrix: expected the shape (T, T) with T >= 1, got {matrix.shape}")
    if np.any(matrix < 0) or np.any(matrix > 1):
        raise ValueError("accuracy matrix: expected accuracies in [0, 1] or NaN; divide percentages by 100")
    return matrix


def _mean(values: _Matrix) -> float:
    """The mean of ``values``; NaN where there are none or one of them is NaN."""
    return float(np.mean(values)) if values.size else float("nan")


def average_accuracy(R: ArrayLike) -> float:
    """``ACC = (1/T) sum_j R[T, j]``, in [0, 1]; Lopez-Paz & Ranzato. Also called retained accuracy."""
    return _mean(_matrix(R)[-1])


def average_accuracy_so_far(R: ArrayLike) -> NDArray[np.float64]:
    """``A_k = (1/k) sum_{j<=k} R[k, j]`` for every ``k``, ``(T,)``; A-GEM eq. 1. The last is ``ACC``."""
    matrix = _matrix(R)
    return np.array([_mean(row[: k + 1]) for k, row in enumerate(matrix)])


def forgetting(R: ArrayLike) -> float:
    """``F_T = (1/(T-1)) sum_{j<T} f_j``, ``f_j = max_{l<T} R[l, j] - R[T, j]``, in [-1, 1]; A-GEM eq. 2-3.

    The maximum runs over every earlier row that was measured, zero-shot ones (``l < j``) included, as in the
    paper. A task that was never measured before the last one has no ``f_j``, which makes the whole NaN.
    Exactly 0.0 where no accuracy moved.
    """
    matrix = _matrix(R)
    before, after = matrix[:-1, :-1], matrix[-1, :-1]
    best = np.max(np.where(np.isnan(before), -np.inf, before), axis=0, initial=-np.inf)
    return _mean(np.where(np.isinf(best), np.nan, best) - after)


def backward_transfer(R: ArrayLike) -> float:
    """``BWT = (1/(T-1)) sum_{j<T} (R[T, j] - R[j, j])``, in [-1, 1]; Lopez-Paz & Ranzato.

    The code released with the paper divides by ``T`` instead of ``T - 1``.
    """
    matrix = _matrix(R)
    return _mean(matrix[-1, :-1] - np.diagonal(matrix)[:-1])


def forward_transfer(R: ArrayLike, baseline: ArrayLike | None = None) -> float:
    """``FWT = (1/(T-1)) sum_{j>=2} (R[j-1, j] - b_j)``, in [-1, 1]; Lopez-Paz & Ranzato.

    ``baseline`` ``(T,)`` holds ``b_j``, the accuracy on task ``j`` of the network as initialised; ``b_1`` is
    not used. Without a baseline it is not defined, hence NaN. The code released with the paper divides by
    ``T``.
    """
    matrix = _matrix(R)
    if baseline is None:
        return float("nan")
    untrained = np.asarray(baseline, dtype=np.float64)
    if untrained.shape != matrix.shape[:1]:
        raise ValueError(
            f"baseline: expected one accuracy per task, {matrix.shape[:1]}, got {untrained.shape}"
        )
    return _mean(np.diagonal(matrix, offset=1) - untrained[1:])


def learning_accuracy(R: ArrayLike) -> float:
    """``LA = (1/T) sum_j R[j, j]``, in [0, 1]; Riemer et al."""
    return _mean(np.diagonal(_matrix(R)))


def backward_transfer_and_interference(R: ArrayLike) -> float:
    """``BTI = ACC - LA``, in [-1, 1]; Riemer et al."""
    return average_accuracy(R) - learning_accuracy(R)


def intransigence(R: ArrayLike, reference_accuracy: float) -> float:
    """``I_T = a*_T - R[T, T]``, in [-1, 1], lower is better; Chaudhry et al. 2018.

    ``reference_accuracy`` is ``a*_T``: the accuracy on the last task of a model trained on all tasks at once.
    """
    return float(reference_accuracy - _matrix(R)[-1, -1])


def accuracy_diaz_rodriguez(R: ArrayLike) -> float:
    """``A = sum_{i>=j} R[i, j] / (T(T+1)/2)``, in [0, 1]; Diaz-Rodriguez et al., eq. 2."""
    matrix = _matrix(R)
    return _mean(matrix[np.tril_indices_from(matrix)])


def backward_transfer_diaz_rodriguez(R: ArrayLike) -> float:
    """``BWT = sum_{i>=2} sum_{j<i} (R[i, j] - R[j, j]) / (T(T-1)/2)``, in [-1, 1]; Diaz-Rodriguez eq. 3."""
    matrix = _matrix(R)
    moved = matrix - np.diagonal(matrix)[None, :]
    return _mean(moved[np.tril_indices_from(moved, k=-1)])


def remembering(R: ArrayLike) -> float:
    """``REM = 1 - |min(BWT, 0)|`` with the BWT of Diaz-Rodriguez et al., in [0, 1]; 1: nothing forgotten."""
    return float(1 + np.minimum(backward_transfer_diaz_rodriguez(R), 0.0))


def positive_backward_transfer(R: ArrayLike) -> float:
    """``BWT+ = max(BWT, 0)`` with the BWT of Diaz-Rodriguez et al., in [0, 1]."""
    return float(np.maximum(backward_transfer_diaz_rodriguez(R), 0.0))


def forward_transfer_diaz_rodriguez(R: ArrayLike) -> float:
    """``FWT = sum_{i<j} R[i, j] / (T(T-1)/2)``, in [0, 1], no baseline subtracted; Diaz-Rodriguez eq. 4."""
    matrix = _matrix(R)
    return _mean(matrix[np.triu_indices_from(matrix, k=1)])


def model_size_efficiency(sizes: Sequence[float] | NDArray[np.float64]) -> float:
    """``MS = min(1, (1/T) sum_i Mem(theta_1) / Mem(theta_i))``, in (0, 1]; Diaz-Rodriguez et al.

    ``sizes`` ``(T,)``: the whole stored model after each task (trunk, heads, old columns, masks as bits), in
    any one unit. 1 for a network that does not grow.
    """
    stored = np.asarray(sizes, dtype=np.float64)
    if stored.ndim != 1 or stored.size == 0 or np.any(stored <= 0):
        raise ValueError("sizes: expected one positive size per task")
    return float(np.minimum(1.0, np.mean(stored[0] / stored)))
