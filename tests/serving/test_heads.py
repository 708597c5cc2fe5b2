"""The table of heads answers as a list of heads does, whatever was put into it and in which order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lifelong_ens.networks.task import Heads
from lifelong_ens.serving import heads as heads_module
from lifelong_ens.serving.heads import SlotHeads


@settings(deadline=None, max_examples=60)
@given(
    writes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=30),
    leading=st.sampled_from([(), (2,), (2, 3)]),
    gathers=st.booleans(),
)
def test_equals_a_list_of_heads(writes, leading, gathers):
    table, plain = SlotHeads(4), Heads()
    torch.manual_seed(0)
    for place, size in writes:
        slot = min(place, len(plain))
        head = nn.Linear(4, size).requires_grad_(False)
        if slot == len(plain):
            plain.append(head)
        else:
            plain[slot] = head
        table.put(slot, head.weight, head.bias)
    tasks = torch.randint(0, len(plain), (9,))
    features = torch.randn(*leading, 9, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads_module, "GATHERED_PER_HEAD", 10**9 if gathers else 0)
        torch.testing.assert_close(table(features, tasks), plain(features, tasks), rtol=1e-6, atol=1e-6)
        for slot in range(len(plain)):
            assert torch.equal(table(features, slot), plain(features, slot))


def test_rows_that_nobody_has_are_dropped():
    table = SlotHeads(2)
    table.put(0, torch.ones(3, 2), torch.ones(3))
    for number in range(1000):
        size = 1 + number % 7
        table.put(1, torch.full((size, 2), float(number)), torch.full((size,), float(number)))
        assert table(torch.ones(1, 2), 0).tolist() == [[3.0] * 3]
        assert table(torch.ones(1, 2), 1).tolist() == [[3.0 * number] * size]
    assert len(table.bias) <= 4 * (3 + 7)
