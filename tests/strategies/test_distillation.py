"""LwF: its loss, its teacher, and how often the body runs."""

from __future__ import annotations

import pytest
import torch
from avalanche.training import LearningWithoutForgetting as AvalancheLwF
from torch import nn

from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import Body
from lifelong_ens.training.fit import Fit
from strategies import finetune, lwf
from strategies.distillation import distillation_loss
from streams import split_digits

FIT = Fit(epochs=3, batch_size=32, momentum=0.9, weight_decay=5e-3)


@pytest.fixture(scope="module")
def benchmark():
    return split_digits(num_tasks=3, seed=0)


def conv_body() -> Body:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)]
    return Body(nn.Sequential(*layers), 144, None)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_loss_is_avalanche_s(temperature):
    torch.manual_seed(0)
    logits, wanted = torch.randn(9, 4), torch.randn(9, 4)
    expected = AvalancheLwF(1, temperature)._distillation_loss(logits, wanted, set(range(4)))
    torch.testing.assert_close(distillation_loss(logits, wanted, temperature), expected)


def test_its_gradient_is_that_of_the_paper_s_cross_entropy():
    torch.manual_seed(0)
    logits, wanted = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    soft = [
        (torch.softmax(one, dim=1) ** 0.5) / (torch.softmax(one, dim=1) ** 0.5).sum(1, True)
        for one in (logits, wanted)
    ]
    (expected,) = torch.autograd.grad(-(soft[1] * soft[0].log()).sum(dim=1).mean(), logits)
    (found,) = torch.autograd.grad(distillation_loss(logits, wanted, 2.0), logits)
    torch.testing.assert_close(found, expected)


def drift(strategy, benchmark) -> float:
    """How far the first head's answers to the second task's images move while that is learnt."""
    x, _, _ = benchmark.train_stream[1].dataset.batch(torch.arange(100))
    strategy.train(benchmark.train_stream[0])
    answers = []
    for _ in range(2):
        with torch.no_grad():
            answers.append(torch.softmax(strategy.network.eval()(x, 0), dim=1))
        strategy.train(benchmark.train_stream[1])
    return float((answers[0] - answers[1]).abs().mean())


def test_earlier_heads_go_on_answering_as_they_did(benchmark):
    assert drift(lwf(conv_body(), fit=FIT), benchmark) < 0.5 * drift(
        finetune(conv_body(), fit=FIT), benchmark
    )


def test_teacher_stands_still_answers_in_evaluation_mode_and_is_not_kept(benchmark):
    strategy = lwf(conv_body(), fit=FIT)
    strategy.train(benchmark.train_stream[0])
    before = {name: tensor.clone() for name, tensor in strategy.network.state_dict().items()}
    seen = []

    def look():
        seen.append(strategy._teacher)
        assert not any(module.training for module in strategy._teacher.modules())

    strategy.on_step = look
    strategy.train(benchmark.train_stream[1])
    after = seen[-1].state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert strategy._teacher is None
    assert strategy.network.state_dict().keys() == finetuned_keys(benchmark)


def finetuned_keys(benchmark):
    strategy = finetune(conv_body(), fit=FIT)
    for experience in benchmark.train_stream[:2]:
        strategy.train(experience)
    return strategy.network.state_dict().keys()


def test_student_and_teacher_run_once_per_step_and_are_counted(benchmark):
    fit = Fit(epochs=1, batch_size=64)
    calls, flops = [], []
    for build in (finetune, lwf):
        strategy = build(conv_body(), fit=fit)
        count = []
        strategy.network.body.register_forward_hook(lambda *_, count=count: count.append(1))
        for experience in benchmark.train_stream:
            strategy.train(experience)
            flops.append(strategy.meter.flops)
        calls.append(len(count))
    steps = sum(-(-len(experience.dataset) // 64) for experience in benchmark.train_stream)
    # the teacher is a copy, hook included, from the second task on
    assert calls == [steps, 2 * steps - -(-len(benchmark.train_stream[0].dataset) // 64)]
    rows = [len(experience.dataset) for experience in benchmark.train_stream]
    conv, head = 2 * 6 * 6 * 9 * 4, [2 * 144 * len(classes) for classes in benchmark.classes]
    assert flops[0] == flops[3]
    # teacher forward; the student's heads of earlier tasks forward and backward
    second = rows[1] * (conv + head[0] + 3 * head[0])
    third = rows[2] * (conv + 4 * (head[0] + head[1]))
    assert flops[4] - flops[1] == pytest.approx(second)
    assert flops[5] - flops[2] == pytest.approx(second + third)


@pytest.mark.parametrize("options", [{"lwf_lambda": -0.1}, {"temperature": 0.0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        lwf(conv_body(), **options)
