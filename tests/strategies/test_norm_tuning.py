from __future__ import annotations

import pytest
import torch
from torch import nn

from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import Body, lenet5
from strategies.norm_tuning import NormTunedNetwork


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6)])
def test_each_task_trains_its_norms_and_its_head_alone(norm):
    network = NormTunedNetwork(Body(nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU()), 6, None))
    network.begin_task(3)
    first = {name for name, p in network.named_parameters() if p.requires_grad}
    assert any("features.0.weight" in name for name in first)
    network.finish_task()
    network.begin_task(2)
    second = {name for name, p in network.named_parameters() if p.requires_grad}
    prefix = "body.features.1"
    expected = {f"{prefix}.private_weight.active", f"{prefix}.private_bias.active"}
    assert second == expected | {"heads.1.weight", "heads.1.bias"}


@pytest.mark.parametrize(("start", "value"), [("first", 2.0), ("previous", 3.0)])
def test_a_new_task_s_norms_start_where_asked(start, value):
    network = NormTunedNetwork(
        Body(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), 6, None), start=start
    ).regrow([2, 2])
    scale = network.body.features[1].private_weight
    scale.committed[0], scale.committed[1] = 2.0, 3.0
    network.begin_task(2)
    assert torch.equal(scale.row(2), torch.full((6,), value))


def test_a_network_without_norms_is_refused():
    with pytest.raises(InputError, match="no batch, layer or group norm"):
        NormTunedNetwork(lenet5(input_shape=(1, 28, 28)))
