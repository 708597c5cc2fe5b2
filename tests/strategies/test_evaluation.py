"""What is right when the task is guessed: another task's answer too, where the class is the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from experiments.examination import Examination
from lifelong_ens import Fit
from lifelong_ens.networks import mlp
from lifelong_ens.training.data import ImageData
from strategies import finetune, independent
from strategies.evaluation import Claims, infer_tasks, predict, shares_found
from streams.benchmark import make_benchmark

# of five images of the task that was learnt second: the guessed task is 0, 0, 1, 1, 2 by its index in the network
CERTAINTY = [[0.9, 0.8, 0.1, 0.2, 0.0], [0.1, 0.2, 0.7, 0.9, 0.1], [0.0, 0.0, 0.3, 0.1, 0.5]]
LABEL = [[1, 0, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 1, 0, 2]]
OWN = [0, 1, 1, 0, 1]


def shares(classes, truth):
    """``shares_found`` of one task's images by hand."""
    model = SimpleNamespace(tasks={7: 0, 3: 1, 5: 2})
    answers = torch.eye(2)[OWN].add(1e-3).log().unsqueeze(0), torch.tensor(truth)
    return shares_found(
        SimpleNamespace(model=model),  # type: ignore[arg-type]
        SimpleNamespace(task_labels=[3]),  # type: ignore[arg-type]
        Claims(torch.tensor(CERTAINTY), torch.tensor(LABEL)),
        answers,
        classes,
    )


def test_tasks_of_the_same_classes_answer_for_each_other():
    # labels are the same in all tasks: right are 1, not 0 (image 1), 1, 0, and of three classes the 2 is not 1
    same = {7: [0, 1], 3: [0, 1], 5: [0, 1, 2]}
    assert shares(same, truth=[1, 1, 1, 0, 1]) == pytest.approx((0.4, 0.6))
    # as the classes of task 7 are in another order, what it calls 1 is class 0
    turned = {7: [1, 0], 3: [0, 1], 5: [0, 9, 1]}
    assert shares(turned, truth=[1, 1, 1, 0, 1]) == pytest.approx((0.4, 0.8))
    assert shares(turned, truth=[0, 0, 0, 1, 0]) == pytest.approx((0.4, 0.2))


def test_tasks_of_other_classes_do_not():
    apart = {7: [0, 1], 3: [2, 3], 5: [4, 5, 6]}
    assert (
        shares(apart, truth=[1, 1, 1, 0, 1])
        == shares(None, truth=[1, 1, 1, 0, 1])
        == pytest.approx((0.4, 0.4))
    )
    # only one class is in two tasks
    assert shares({**apart, 7: [0, 3]}, truth=[1, 1, 1, 0, 1]) == pytest.approx((0.4, 0.6))


@pytest.fixture(scope="module")
def domains():
    """Two tasks with the same two classes, dark and bright, from domains that differ in half of the image."""
    numbers = torch.Generator().manual_seed(0)
    images = torch.randint(0, 40, (160, 1, 4, 4), generator=numbers, dtype=torch.uint8)
    labels = torch.arange(160) % 2
    images[labels == 1] += 120
    images[80:, :, :2] += 90
    scale = torch.tensor([100.0]), torch.tensor([50.0])
    rows = torch.arange(160).split(40)
    parts = [ImageData(images, row, labels[row], *scale) for row in rows]
    return make_benchmark(parts[::2], parts[1::2], classes=[[0, 1], [0, 1]], class_names=["dark", "bright"])


@pytest.mark.parametrize("build", [finetune, independent])
def test_an_examination_knows_which_classes_are_shared(domains, build):
    fit = Fit(epochs=8, batch_size=16, learning_rate=0.05)
    strategy = build(mlp(input_shape=(1, 4, 4), hidden=(8,)), fit=fit, seed=1)
    exam = Examination(domains.test_stream, "entropy", classes=domains.classes)
    for task, experience in enumerate(domains.train_stream):
        strategy.train(experience)
        row = exam.examine(strategy, range(task + 1), last=task == 1)
    for index, test in enumerate(domains.test_stream):
        x, y, _ = test.dataset.batch(torch.arange(40))
        with torch.no_grad():
            probs = torch.stack([strategy.network.eval()(x, task).softmax(-1) for task in range(2)])
        surest = (probs * probs.log()).sum(-1).argmax(0)
        answer = probs.argmax(-1)[surest, torch.arange(40)]
        expected = float((surest == index).double().mean()), float((answer == y).double().mean())
        told = row.uncertainty[index]
        found = told["task_identification_accuracy"], told["class_incremental_accuracy"]
        assert found == pytest.approx(expected)
        assert infer_tasks(strategy, test, "entropy", domains.classes) == pytest.approx(expected)
        # a right class in spite of a wrong domain
        assert found[1] > found[0] or found[0] == 1
        apart = infer_tasks(strategy, test, "entropy")
        log_probs, labels = predict(strategy, [test])
        both = (surest == index) & (log_probs[0].argmax(-1) == labels)
        assert apart == pytest.approx((expected[0], float(both.double().mean())))
