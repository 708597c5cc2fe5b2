"""Greedy selection against its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelong_ens.ensembles.greedy import SMALLEST_GAIN, greedy_selection
from lifelong_ens.errors import InputError
from lifelong_ens.metrics.uncertainty import nll


def library(seed: int, candidates: int, batch: int = 12, classes: int = 4, sharpness: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(candidates, batch, classes, generator=generator, dtype=torch.double)
    return logits.log_softmax(-1), torch.randint(0, classes, (batch,), generator=generator)


def by_definition(log_probs, labels, num_members):
    """Section 3.2, word for word: every mixture's likelihood from its full probabilities."""
    probs, chosen, best = log_probs.exp(), [], math.inf
    path = []
    while len(set(chosen)) < num_members:
        losses = [
            float(nll(probs[[*chosen, j]].mean(dim=0, keepdim=True).log(), labels)) for j in range(len(probs))
        ]
        pick = min(range(len(losses)), key=losses.__getitem__)
        if not losses[pick] < best - SMALLEST_GAIN:
            break
        chosen.append(pick)
        best = losses[pick]
        path.append(best)
    return torch.bincount(torch.tensor(chosen), minlength=len(probs)), path


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    candidates=st.integers(1, 7),
    members=st.integers(1, 5),
    sharpness=st.sampled_from([0.3, 2.0, 8.0]),
)
def test_equals_the_definition_and_never_gets_worse(seed, candidates, members, sharpness):
    log_probs, labels = library(seed, candidates, sharpness=sharpness)
    counts = greedy_selection(log_probs, labels, members)
    expected, path = by_definition(log_probs, labels, members)
    assert counts.tolist() == expected.tolist()
    assert all(later < earlier for earlier, later in itertools.pairwise(path))
    assert 1 <= int((counts > 0).sum()) <= members
    # the mixture is at least as good as the best single candidate, which is in it
    singles = torch.stack([nll(one[None], labels) for one in log_probs])
    mixture = nll((counts[:, None, None] / counts.sum() * log_probs.exp()).sum(0, keepdim=True).log(), labels)
    assert float(mixture) <= float(singles.min()) + 1e-12
    assert counts[int(singles.argmin())] > 0


def test_two_members_match_a_search_over_all_pairs_that_hold_the_best():
    for seed in range(20):
        log_probs, labels = library(seed, 6)
        counts = greedy_selection(log_probs, labels, 2)
        singles = torch.stack([nll(one[None], labels) for one in log_probs])
        best = int(singles.argmin())
        if int((counts > 0).sum()) == 2 and counts[best] == 1:
            partner = next(j for j in counts.nonzero().flatten().tolist() if j != best)
            pairs = {j: float(nll(log_probs[[best, j]], labels)) for j in range(6)}
            assert pairs[partner] == min(pairs.values())


def test_one_member_is_the_best_single_candidate():
    log_probs, labels = library(3, 8)
    counts = greedy_selection(log_probs, labels, 1)
    assert counts.sum() == 1
    assert counts.argmax() == torch.stack([nll(one[None], labels) for one in log_probs]).argmin()


def test_repetition_raises_a_weight():
    labels = torch.zeros(8, dtype=torch.long)
    good = torch.tensor([0.9] * 6 + [0.2] * 2)
    complement = torch.tensor([0.5] * 6 + [0.95] * 2)
    never = torch.full((8,), 1e-3)
    probs = torch.stack([good, complement, never])
    log_probs = torch.stack([probs, 1 - probs], dim=-1).log()
    counts = greedy_selection(log_probs, labels, 3)
    assert counts.tolist() == by_definition(log_probs.double(), labels, 3)[0].tolist()
    assert counts[2] == 0
    assert counts[0] > counts[1] > 0


def test_probabilities_too_small_for_floats_are_told_apart():
    labels = torch.zeros(2, dtype=torch.long)
    # of the label: exp(-2000) is zero even in float64
    log_probs = torch.tensor([[[-2000.0, 0.0]] * 2, [[-1990.0, 0.0]] * 2, [[-1995.0, 0.0]] * 2])
    assert greedy_selection(log_probs, labels, 1).tolist() == [0, 1, 0]


def test_an_equal_candidate_is_not_added_and_one_with_nan_never():
    log_probs, labels = library(0, 1)
    same = torch.cat([log_probs, log_probs])
    assert greedy_selection(same, labels, 2).tolist() == [1, 0]
    nan = torch.cat([torch.full_like(log_probs, math.nan), log_probs])
    assert greedy_selection(nan, labels, 2).tolist() == [0, 1]


def test_picking_ends_where_only_dilution_is_left():
    """The best single candidate is useless beside the other two, which together are perfect."""
    labels = torch.zeros(4, dtype=torch.long)
    probs = torch.tensor(
        [[0.6, 0.6, 0.6, 0.6], [0.999, 0.999, 0.1, 0.1], [0.1, 0.1, 0.999, 0.999], [1e-9] * 4]
    )
    log_probs = torch.stack([probs, 1 - probs], dim=-1).double().log()
    counts = greedy_selection(log_probs, labels, 4)
    assert counts[3] == 0
    assert counts.sum() < 5000


def test_bad_input_is_refused():
    log_probs, labels = library(0, 2)
    with pytest.raises(InputError, match="at least one member"):
        greedy_selection(log_probs, labels, 0)
    with pytest.raises(InputError, match="no candidate"):
        greedy_selection(torch.full_like(log_probs, math.nan), labels, 1)
    with pytest.raises(ValueError, match="expected log_probs"):
        greedy_selection(log_probs, labels[:-1], 1)
