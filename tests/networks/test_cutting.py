from __future__ import annotations

import torch

from lifelong_ens.networks.channels import trace_channels
from lifelong_ens.networks.cutting import keep_channels, positions
from lifelong_ens.networks.plain import lenet5


def test_a_chain_without_channels_that_are_zero_is_smaller_and_the_same():
    torch.manual_seed(0)
    body, x = lenet5(5), torch.randn(3, 3, 32, 32)
    modules = dict(body.named_modules())
    groups = trace_channels(body)
    kept = [torch.arange(group.size) % 3 != 1 for group in groups]
    # the classifier keeps its rows
    kept[-1][:] = True
    with torch.no_grad():
        for group, keep in zip(groups, kept, strict=True):
            for name in group.writers:
                modules[name].weight[~keep] = 0
                modules[name].bias[~keep] = 0
        expected = body(x)
        keep_channels(body, groups, kept)
        torch.testing.assert_close(body(x), expected, rtol=1e-5, atol=1e-6)
    shapes = [tuple(modules[group.name].weight.shape) for group in groups]
    assert shapes == [(4, 3, 5, 5), (11, 4, 5, 5), (80, 275), (56, 80), (5, 56)]
    assert (modules["features.7"].in_features, modules["features.7"].out_features) == (275, 80)


def test_a_flattened_channel_has_all_its_positions():
    assert positions(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
