"""The published cost columns of FreeTickets, and RigL's of ResNet-50, from the convention alone."""

from __future__ import annotations

import pytest
import torch
import torchvision

from lifelong_ens.accounting.sparse import erk_flops_share, training_cost
from lifelong_ens.networks import mlp, wrn28_10


@pytest.mark.parametrize(
    ("num_classes", "sparsity", "share"), [(10, 0.8, 0.340), (100, 0.8, 0.337), (10, 0.9, 0.169)]
)
def test_flops_of_a_sparse_wide_resnet(num_classes, sparsity, share):
    with torch.device("meta"):
        found = erk_flops_share(wrn28_10(num_classes), torch.empty(1, 3, 32, 32), 1 - sparsity)
    assert found == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize(("sparsity", "share"), [(0.8, 0.414), (0.9, 0.242)])
def test_flops_of_a_sparse_resnet50(sparsity, share):
    with torch.device("meta"):
        network, x = torchvision.models.resnet50(), torch.empty(1, 3, 224, 224)
        assert erk_flops_share(network, x, 1 - sparsity) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize(
    ("share", "epochs", "dense_epochs", "published"),
    [
        (0.3396, 3 * 250, 250, 1.02),  # DST, 3 members, WRN-28-10 on CIFAR-10
        (0.3371, 3 * 250, 250, 1.01),  # on CIFAR-100
        (0.3396, 150 + 3 * 100, 250, 0.611),  # EDST, 3 members
        (0.1686, 150 + 7 * 100, 250, 0.573),  # 7 members at 0.9
        (0.414, 30 + 2 * 70, 100, 0.70),  # ResNet-50 on ImageNet
        (0.414, 30 + 4 * 70, 100, 1.28),
        (0.414, 2 * 100, 100, 0.83),
    ],
)
def test_published_training_costs(share, epochs, dense_epochs, published):
    assert training_cost(share, epochs, dense_epochs) == pytest.approx(published, abs=5e-3)
    # growth by gradient every 1000 steps
    cost = training_cost(share, epochs, dense_epochs, update_every=1000)
    assert 1 < cost / training_cost(share, epochs, dense_epochs) < 1.002


def test_the_dense_gradient_is_one_of_three_products():
    assert training_cost(0.2, 1, 1, update_every=1) == pytest.approx((0.6 + 0.4 + 1) / 2 / 3)
    assert training_cost(1.0, 5, 2, update_every=7) == pytest.approx(2.5)


def test_layers_that_run_at_one_position_have_their_density():
    with torch.device("meta"):
        found = erk_flops_share(mlp(10, hidden=(50, 50)), torch.empty(3, 1, 28, 28), 0.3)
    assert found == pytest.approx(0.3)
