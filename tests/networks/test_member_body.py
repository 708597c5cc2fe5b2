from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from lifelong_ens.errors import InputError
from lifelong_ens.layers.bank import Selection
from lifelong_ens.layers.masked import MaskedLayer
from lifelong_ens.networks.member_body import MemberBody, mask_layers, member_norms
from lifelong_ens.networks.plain import Body


class Whole(MaskedLayer):
    """Every task uses the whole weight."""

    def task_weight(self, task: int) -> Tensor:
        return self.weight


class OneTaskAPass(MemberBody):
    mixed_rows = False


def body(*layers: nn.Module, num_features: int = 4) -> Body:
    return Body(nn.Sequential(*layers), num_features, None)


def make(selection: Selection):
    return lambda layer: Whole(layer, selection, "shared")


@pytest.mark.parametrize("norm", ["statistics_only", "per_member", "shared_frozen"])
def test_member_norms_leave_the_body_as_it_was(norm):
    plain = body(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4))
    members, selection, has_members = member_norms(plain, norm)
    assert has_members == (norm != "shared_frozen")
    assert type(plain.features[1]) is nn.BatchNorm1d
    x = torch.randn(6, 3)
    with selection.of(0):
        torch.testing.assert_close(members.eval()(x), plain.eval()(x))


def test_norm_without_statistics_is_left_where_only_statistics_are_asked():
    _, _, has_members = member_norms(body(nn.Linear(3, 4), nn.LayerNorm(4)), "statistics_only")
    assert not has_members


def test_rows_of_several_tasks_in_one_pass_or_apart():
    members, selection, _ = member_norms(body(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()), "per_member")
    networks = [kind(members, selection) for kind in (MemberBody, OneTaskAPass)]
    networks[0].begin_task(3)
    networks[0].finish_task()
    networks[0].begin_task(3)
    networks[0].finish_task()
    networks[1].heads = networks[0].heads
    for bank in (members.features[1].private_weight, members.features[1].running_mean):
        bank.committed[1] += 1
    x, task = torch.randn(7, 3), torch.tensor([0, 1, 1, 0, 1, 0, 1])
    both, apart = (network.eval()(x, task) for network in networks)
    torch.testing.assert_close(both, apart)
    for one in (0, 1):
        torch.testing.assert_close(both[task == one], networks[0](x[task == one], one))


def test_mask_layers_needs_layers_that_it_knows():
    with pytest.raises(InputError, match="no linear or convolution"):
        mask_layers(body(nn.Flatten()), make(Selection()))


def test_mask_layers_refuses_a_weight_of_two_layers():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    with pytest.raises(InputError, match="share one weight"):
        mask_layers(body(first, second), make(Selection()))


def test_mask_layers_puts_a_layer_that_stands_twice_in_both_places():
    layer, selection = nn.Linear(4, 4), Selection()
    masked = mask_layers(body(layer, nn.ReLU(), layer), make(selection))
    assert masked.features[0] is masked.features[2]
    assert isinstance(masked.features[0], Whole)


def test_mask_layers_says_what_has_no_mask(caplog):
    with caplog.at_level(logging.WARNING):
        mask_layers(body(nn.Embedding(5, 4), nn.Linear(4, 4)), make(Selection()))
    assert "features.0 (Embedding)" in caplog.text


def test_masked_transformer_layer_does_not_bypass_its_masks():
    class Zero(MaskedLayer):
        def task_weight(self, task: int) -> Tensor:
            return torch.zeros_like(self.weight)

    selection = Selection()
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    masked = mask_layers(body(layer), lambda one: Zero(one, selection, "shared")).eval()
    x = torch.randn(2, 3, 4)
    with selection.of(0), torch.no_grad():
        fast = masked(x)
    with selection.of(0):
        torch.testing.assert_close(fast, masked(x))
