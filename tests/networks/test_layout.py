"""A body with members can be built again from what its layout says."""

from __future__ import annotations

import pytest
import torch

from lifelong_ens.layers.bank import banks
from lifelong_ens.networks.layout import Layout
from lifelong_ens.networks.plain import resnet20, without_classifier

LAYOUTS = {
    "all": Layout("all"),
    "more pairs": Layout("all", "per_member", "shared", rank=2, additive=1),
    "frozen norms": Layout("all", "shared_frozen"),
    "norms": Layout("norms", "per_member"),
    "none": Layout("none"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("num_members", [0, 1, 3])
def test_every_bank_has_as_many_members(layout, num_members):
    body = without_classifier(resnet20(width=2, input_shape=(3, 8, 8)))
    members, selection = layout.with_members(body, num_members)
    found = list(banks(members))
    assert bool(found) == (layout.layers != "none")
    assert {bank.num_members for bank in found} <= {num_members}
    assert not list(banks(body))
    if num_members and layout.layers != "all":  # fast weights start as random signs
        x = torch.randn(2, 3, 8, 8)
        with selection.of(0):
            torch.testing.assert_close(members.eval()(x), body.eval()(x), rtol=1e-5, atol=1e-5)
