"""Every strategy on the networks of the field, with real images: what the contract shows in depth, here in breadth."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import strategies
from experiments import catalogue
from lifelong_ens.errors import UnfitNetworkError
from lifelong_ens.networks import lenet5, resnet18, vgg11_half
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy
from streams import split_cifar100

pytestmark = pytest.mark.data

NETWORKS = {"lenet5": lenet5, "resnet18": functools.partial(resnet18, width=20), "vgg11_half": vgg11_half}
# what each has none of
UNFIT = {("bn_tuned", "lenet5"), ("bn_tuned", "vgg11_half")}
# less of what costs time
OPTIONS: dict[str, dict[str, Any]] = {
    "structured_ensemble": {"mask_epochs": 1},
    "rcl": {"trials": 2},
    "ewc": {"fisher_images": 20},
    "gem": {"memory": 20},
}
FIT = Fit(epochs=1, batch_size=16, learning_rate=0.01, momentum=0.9, weight_decay=1e-3)


@pytest.fixture(scope="module")
def benchmark(unpacked, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIFELONG_ENS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return split_cifar100(root=unpacked("cifar100"), num_tasks=5, limit=16)


def logits(strategy: Strategy, benchmark, task: int) -> Tensor:
    x, _, _ = benchmark.test_stream[task].dataset.batch(torch.arange(20))
    network = strategy.network.eval()
    with torch.no_grad():
        return network(x, task)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", strategies.BUILDERS)
def test_two_tasks_on_real_images(name, network, benchmark):
    build = functools.partial(
        catalogue.load(strategies.BUILDERS[name]), fit=FIT, seed=0, **OPTIONS.get(name, {})
    )
    if (name, network) in UNFIT:
        with pytest.raises(UnfitNetworkError):
            build(NETWORKS[network]())
        return
    torch.manual_seed(0)
    strategy = build(NETWORKS[network]())
    if strategy.joint:
        strategy.train(benchmark.train_stream[:2])
    else:
        strategy.train(benchmark.train_stream[0])
        before = logits(strategy, benchmark, 0)
        strategy.train(benchmark.train_stream[1])
        assert torch.equal(before, logits(strategy, benchmark, 0)) == strategy.network.frozen_past
    other = build(NETWORKS[network]())
    other.network.regrow(strategy.network.classes_per_task)
    other.network.load_state_dict(strategy.network.state_dict())
    for task in range(2):
        expected = logits(strategy, benchmark, task)
        assert expected.isfinite().all()
        assert torch.equal(expected, logits(other, benchmark, task))
