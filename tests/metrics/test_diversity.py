from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lifelong_ens.metrics import diversity


def members(
    num_members: int, batch: int = 40, num_classes: int = 5, seed: int = 0, spread: float = 1.0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = 2 * torch.randn(batch, num_classes, generator=generator, dtype=torch.float64)
    own = torch.randn(num_members, batch, num_classes, generator=generator, dtype=torch.float64)
    return (common + spread * own).log_softmax(-1)


def pairs(log_probs: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(itertools.combinations(log_probs.unbind(), 2))


def test_disagreement_averages_over_pairs() -> None:
    three = torch.tensor([[[0.9, 0.1]], [[0.8, 0.2]], [[0.1, 0.9]]]).log()
    assert diversity.disagreement(three).item() == pytest.approx(2 / 3)
    log_probs = members(4)
    slow = [(a.argmax(1) != b.argmax(1)).double().mean() for a, b in pairs(log_probs)]
    assert diversity.disagreement(log_probs).item() == pytest.approx(torch.stack(slow).mean().item())


def test_normalised_disagreement_divides_by_the_mean_error_of_the_members() -> None:
    two = torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.8, 0.2], [0.1, 0.9]]]).log()
    # they differ on one of two examples; the first errs on one, the second on none
    assert diversity.normalised_disagreement(two, torch.tensor([0, 1])).item() == pytest.approx(0.5 / 0.25)
    assert diversity.normalised_disagreement(two[:1].repeat(2, 1, 1), torch.tensor([0, 0])).isnan()


@given(st.integers(2, 5), st.integers(1, 6), st.integers(2, 5), st.integers(0, 2**31))
def test_pairs_one_by_one_give_the_same_numbers(
    num_members: int, batch: int, num_classes: int, seed: int
) -> None:
    log_probs = members(num_members, batch, num_classes, seed)
    kl = [(a.exp() * (a - b)).sum(1).mean() + (b.exp() * (b - a)).sum(1).mean() for a, b in pairs(log_probs)]
    assert diversity.kl_diversity(log_probs).item() == pytest.approx(torch.stack(kl).mean().item() / 2)
    cosines = [torch.nn.functional.cosine_similarity(a.exp(), b.exp()).mean() for a, b in pairs(log_probs)]
    cosine = torch.stack(cosines).mean().item()
    assert diversity.cosine_diversity(log_probs).item() == pytest.approx(1 - cosine, abs=1e-12)


def test_kl_of_excluded_classes_is_infinite_unless_all_exclude_them() -> None:
    opposed = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).log()
    assert diversity.kl_diversity(opposed).item() == math.inf
    both = torch.tensor([[[0.5, 0.5, 0.0]], [[0.25, 0.75, 0.0]]]).log()
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3) + 0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2
    assert diversity.kl_diversity(both).item() == pytest.approx(expected, rel=1e-6)
    assert diversity.cosine_diversity(opposed).item() == pytest.approx(1.0)


def test_error_correlation_equals_numpy() -> None:
    log_probs = members(4, batch=200)
    labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(1))
    wrong = (log_probs.argmax(2) != labels).numpy()
    matrix = np.corrcoef(wrong)
    expected = matrix[np.triu_indices(4, k=1)].mean()
    assert diversity.error_correlation(log_probs, labels).item() == pytest.approx(expected)
    same = log_probs[:1].repeat(3, 1, 1)
    assert diversity.error_correlation(same, labels).item() == pytest.approx(1.0)


def test_error_correlation_is_nan_where_a_member_never_errs() -> None:
    two = torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.8, 0.2], [0.1, 0.9]]]).log()
    assert diversity.error_correlation(two, torch.tensor([0, 1])).isnan()


def test_collapsed_tells_copies_from_members() -> None:
    assert not diversity.collapsed(members(4))
    assert diversity.collapsed(members(1).repeat(4, 1, 1))
    assert diversity.collapsed(members(4, spread=0.01))
    # however sure they are
    sure = 20 * members(4, spread=0.001)
    assert diversity.collapsed(sure.log_softmax(-1))
    one_hot = torch.eye(3).log()
    assert diversity.collapsed(one_hot.repeat(2, 1, 1))
    assert not diversity.collapsed(torch.stack([one_hot, one_hot.flip(0)]))
    assert not diversity.collapsed(members(1))
    assert not diversity.collapsed(torch.full((2, 3, 4), float("nan")))
    assert not diversity.collapsed(torch.zeros(2, 0, 4))


def test_collapse_is_a_gain_of_less_than_the_share_of_the_entropy() -> None:
    p, q = [0.7, 0.3], [0.6, 0.4]
    two = torch.tensor([[p], [q]], dtype=torch.float64).log()
    mean = [0.65, 0.35]
    gain = sum(
        m * (math.log(m) - (math.log(a) + math.log(b)) / 2) for m, a, b in zip(mean, p, q, strict=True)
    )
    entropy = -sum(m * math.log(m) for m in mean)
    assert diversity.collapsed(two, share=1.001 * gain / entropy)
    assert not diversity.collapsed(two, share=0.999 * gain / entropy)


MEASURES = [
    diversity.disagreement,
    diversity.kl_diversity,
    diversity.cosine_diversity,
    lambda log_probs: diversity.error_correlation(log_probs, torch.arange(log_probs.shape[1]) % 5),
    lambda log_probs: diversity.normalised_disagreement(log_probs, torch.arange(log_probs.shape[1]) % 5),
]


@pytest.mark.parametrize("measure", MEASURES)
def test_one_member_no_examples_and_nan_give_nan(measure) -> None:
    assert measure(members(1)).isnan()
    assert measure(torch.zeros(3, 0, 5)).isnan()
    broken = members(3)
    broken[1, 0, 0] = float("nan")
    assert measure(broken).isnan()
    half = measure(members(3).bfloat16())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(measure(members(3)).item(), rel=0.05)
    with pytest.raises(ValueError, match="members, batch, classes"):
        measure(torch.zeros(4, 5))
