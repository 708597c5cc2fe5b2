"""Split-CIFAR-100 in twenty tasks on the reduced ResNet-18: accuracy and cost of all strategies."""

from __future__ import annotations

from experiments.reproduce.declaration import Quick, Reproduction
from experiments.reproduce.shared import ALL_STRATEGIES, CIFAR100, LARGE_FIT

REPRODUCTION = Reproduction(
    name="split_cifar100_resnet18",
    summary="all strategies on twenty tasks of CIFAR-100 with GEM's reduced ResNet-18",
    stream="split_cifar100",
    stream_options={"num_tasks": 20},
    network="resnet18",
    network_options={"width": 20},
    fit=LARGE_FIT,
    seeds=1,
    rows=ALL_STRATEGIES,
    quick=Quick(
        fit={"epochs": 1}, stream={"limit": 40}, strategies={"structured_ensemble": {"mask_epochs": 1}}
    ),
    images=CIFAR100,
    notes=(
        "The stream and network of BatchEnsemble's lifelong experiment (Wen, Tran and Ba, ICLR 2020), which gives "
        "accuracies as a plot alone, and neither optimizer nor epochs; the text says that BatchEnsemble is as "
        "accurate as PNN at a quarter of the time and a fiftieth of the memory.",
        "Norms are BatchNorm, and the paper does not say what a later task does with them. The rows of "
        "`batch_ensemble`: statistics of its own for each task, scales and shifts of its own too, and all norms as the "
        "first task left them.",
    ),
)
