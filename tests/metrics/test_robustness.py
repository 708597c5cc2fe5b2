from __future__ import annotations

import math

import pytest
import torch

from lifelong_ens.metrics import robustness, uncertainty


def cells(names: list[str], severities: list[int]) -> list[tuple[str, int, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            name,
            severity,
            torch.randn(2, 9, 4, generator=generator).log_softmax(-1),
            torch.randint(4, (9,), generator=generator),
        )
        for name in names
        for severity in severities
    ]


def test_means_over_types_and_severities() -> None:
    predictions = cells(["fog", "snow"], [1, 2, 3])
    found = robustness.corrupted_cells(iter(predictions))
    assert [(cell.corruption, cell.severity) for cell in found] == [p[:2] for p in predictions]
    means = robustness.corrupted_means(found)
    for name, metric in (
        ("accuracy", uncertainty.accuracy),
        ("nll", uncertainty.nll),
        ("ece", uncertainty.expected_calibration_error),
        ("brier", uncertainty.brier),
    ):
        each = [metric(log_probs, labels).item() for _, _, log_probs, labels in predictions]
        assert means[name] == pytest.approx(sum(each) / 6)


def test_nothing_is_nan_and_holes_are_refused() -> None:
    assert all(math.isnan(value) for value in robustness.corrupted_means([]).values())
    found = robustness.corrupted_cells(cells(["fog", "snow"], [1, 2]))
    with pytest.raises(ValueError, match="each severity once"):
        robustness.corrupted_means(found[:3])
    with pytest.raises(ValueError, match="each severity once"):
        robustness.corrupted_means([*found[:3], found[0]])
