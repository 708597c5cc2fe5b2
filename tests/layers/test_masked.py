from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lifelong_ens.layers.bank import Selection
from lifelong_ens.layers.masked import MaskedLayer, largest


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(0, 45))
def test_largest_keeps_exactly_as_many_as_asked_and_none_smaller(values, count):
    tensor = torch.tensor(values, dtype=torch.float32)
    mask = largest(tensor, count)
    assert int(mask.sum()) == min(count, len(values))
    if mask.any() and not mask.all():
        assert tensor[mask].min() >= tensor[~mask].max()


def test_largest_takes_the_first_of_equals():
    assert largest(torch.zeros(2, 3), 4).tolist() == [[True, True, True], [True, False, False]]


class Doubling(MaskedLayer):
    """Task t uses the weight times t."""

    def task_weight(self, task: int) -> Tensor:
        return self.weight * task


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (5, 4)),
        (nn.Linear(4, 3, bias=False), (5, 2, 4)),
        (nn.Conv1d(4, 6, 3, padding=1, groups=2), (5, 4, 7)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), (5, 4, 7, 7)),
        (nn.Conv3d(4, 6, 2, dilation=2), (5, 4, 5, 5, 5)),
    ],
)
@pytest.mark.parametrize("bias", ["shared", "per_member"])
def test_masked_layer_equals_the_plain_one(layer, shape, bias):
    x, selection = torch.randn(shape), Selection()
    expected = layer(x)
    masked = Doubling(layer, selection, bias)
    if masked.private_bias is not None:
        masked.private_bias.commit()
        masked.private_bias.append(masked.private_bias.table() + 1)
    with selection.of(1):
        torch.testing.assert_close(masked(x), expected + (masked.private_bias is not None))


@pytest.mark.parametrize("members", [None, (0, 1), torch.tensor([0, 1])])
def test_masked_layer_takes_one_task_at_a_time(members):
    selection = Selection()
    layer = Doubling(nn.Linear(2, 2), selection, "shared")
    with selection.of(members), pytest.raises(ValueError, match="one task at a time"):
        layer(torch.ones(2, 2))
