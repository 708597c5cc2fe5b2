"""Against the package of Structured Ensembles' author, ``continual-learning`` (PyPI), on the same stream.

Skipped where it is not installed: ``pip install --no-deps continual-learning quadprog``. Its training script
reads data sets of its own and is not used, only its methods. With version 0.1.6.6, digits in five tasks, three seeds,
average accuracy in percent, ours and theirs, at the same number of parameters:

* batch_ensemble: MLP 88.4 and 90.3, LeNet-5 85.0 and 86.6. Theirs scales biases by s too, which gives a task other
  biases without storing any; ours keeps the paper's equations, and by default stores a bias of its own for every task.
* structured_ensemble: MLP 98.0 and 98.0, LeNet-5 96.1 and 95.9.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.accounting.components import sizes
from lifelong_ens.networks import lenet5, mlp
from lifelong_ens.training.fit import Fit
from strategies import batch_ensemble_lifelong, structured_ensemble
from strategies.evaluation import accuracy
from streams import split_digits

pytestmark = pytest.mark.slow

TASKS, EPOCHS, BATCH, LEARNING_RATE, MASK_EPOCHS = 5, 10, 32, 1e-3, 5
FIT = Fit(
    epochs=EPOCHS,
    batch_size=BATCH,
    optimizer="adam",
    learning_rate=LEARNING_RATE,
    weight_decay=0.0,
    schedule="constant",
)
OURS = {
    "batch_ensemble": lambda body, seed: batch_ensemble_lifelong(
        body, init="ones", bias="shared", fit=FIT, seed=seed
    ),
    "structured_ensemble": lambda body, seed: structured_ensemble(
        body, mask_epochs=MASK_EPOCHS, fit=FIT, seed=seed
    ),
}


class Task:
    """One experience in the shape that the package's methods ask for."""

    def __init__(self, index: int, dataset) -> None:
        self.index, self.dataset = index, dataset

    def get_iterator(self, batch_size: int, shuffle: bool = True) -> Batches:
        return Batches(self.dataset, batch_size, shuffle)


class Batches:
    """Batches ``(index, images, labels)``, in a new order at every pass."""

    def __init__(self, dataset, batch_size: int, shuffle: bool) -> None:
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        count = len(self.dataset)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for part in order.split(self.batch_size):
            x, y, _ = self.dataset.batch(part)
            yield part, x, y


def theirs(name: str, body: nn.Module, benchmark) -> tuple[float, int]:
    """Average accuracy and learned numbers after the whole stream with the package's method."""
    from continual_learning.methods.task_incremental.multi_task.gg.batch_ensemble import BatchEnsemble
    from continual_learning.methods.task_incremental.multi_task.gg.super_mask_pruning.BSP import SuperMask
    from continual_learning.solvers.multi_task import MultiHeadsSolver

    # its wrapping looks for layers among children, and leaves what it is given itself alone
    backbone = nn.Sequential(copy.deepcopy(body))
    solver = MultiHeadsSolver(body.num_features, topology=nn.Linear)
    if name == "batch_ensemble":
        method = BatchEnsemble(backbone)
    else:
        method = SuperMask(mask_epochs=MASK_EPOCHS, pruning_percentage=0.5)
    for index, experience in enumerate(benchmark.train_stream):
        task = Task(index, experience.dataset)
        solver.add_task(len(set(map(int, experience.dataset.targets))))
        solver.task = index
        method.on_task_starts(backbone=backbone, solver=solver, task=task)
        parameters = [*method.get_parameters(task=task, backbone=backbone, solver=solver)]
        optimizer = torch.optim.Adam([*parameters, *solver.get_parameters(index)], lr=LEARNING_RATE)
        backbone.train()
        for _ in range(EPOCHS):
            for _, x, y in task.get_iterator(BATCH):
                method.set_task(backbone=backbone, solver=solver, task=task)
                optimizer.zero_grad()
                F.cross_entropy(solver(backbone(x)), y).backward()
                method.after_gradient_calculation(backbone=backbone, solver=solver, task=task)
                optimizer.step()
    backbone.eval()
    accuracies = []
    for index, experience in enumerate(benchmark.test_stream):
        method.set_task(backbone=backbone, solver=solver, task=Task(index, experience.dataset))
        solver.task = index
        x, y, _ = experience.dataset.batch(torch.arange(len(experience.dataset)))
        with torch.no_grad():
            accuracies.append(float((solver(backbone(x)).argmax(1) == y).double().mean()))
    learned = sum(parameter.numel() for module in (backbone, solver) for parameter in module.parameters())
    return float(np.mean(accuracies)), learned


def ours(name: str, body: nn.Module, benchmark, seed: int) -> tuple[float, int]:
    strategy = OURS[name](copy.deepcopy(body), seed)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    mean = float(np.mean([accuracy(strategy, [one]) for one in benchmark.test_stream]))
    return mean, sum(size.parameters for size in sizes(strategy.network).values())


@pytest.mark.parametrize("network", ["mlp", "lenet5"])
@pytest.mark.parametrize("name", OURS)
def test_at_least_the_author_s_accuracy_with_no_more_parameters(name, network, monkeypatch, record_property):
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    pytest.importorskip("quadprog")
    pytest.importorskip("continual_learning")
    results: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(3):
        benchmark = split_digits(num_tasks=TASKS, seed=seed, image_size=None if network == "mlp" else 32)
        torch.manual_seed(seed)
        body = (
            mlp(input_shape=(1, 8, 8), hidden=(128, 128))
            if network == "mlp"
            else lenet5(input_shape=(1, 32, 32))
        )
        found, parameters = ours(name, body, benchmark, seed)
        reference, reference_parameters = theirs(name, body, benchmark)
        results["ours"].append(found)
        results["theirs"].append(reference)
        assert parameters <= reference_parameters
    means = {who: round(100 * float(np.mean(values)), 2) for who, values in results.items()}
    record_property("accuracy", means)
    assert means["ours"] >= means["theirs"] - 2
