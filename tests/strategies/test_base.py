"""The bridge to Avalanche: plugins, loaders, loops, losses."""

from __future__ import annotations

import functools

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from torch._dynamo.testing import CompileCounter

from lifelong_ens.errors import InputError, NonFiniteLossError
from lifelong_ens.networks.plain import mlp
from lifelong_ens.training.fit import Fit
from strategies import (
    Strategy,
    batch_ensemble_lifelong,
    finetune,
    independent,
    joint,
    packnet,
    replay,
    supsup,
)
from strategies.evaluation import accuracy, infer_tasks, predict
from streams import from_arrays, split_digits

FIT = Fit(epochs=2, batch_size=32)


@pytest.fixture(scope="module")
def benchmark():
    return split_digits(num_tasks=3, seed=0)


def body() -> nn.Module:
    torch.manual_seed(0)
    return mlp(input_shape=(1, 8, 8), hidden=(32, 24))


class Counting(SupervisedPlugin):
    """Counts what it is called for in an iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def after_training_iteration(self, strategy, *args, **kwargs) -> None:
        self.calls += 1


class EpochsOnly(SupervisedPlugin):
    """Uses no callback of an iteration."""

    def after_training_epoch(self, strategy, *args, **kwargs) -> None:
        self.seen = True


@pytest.mark.parametrize("options", [{}, {"members_per_task": 2}])
def test_tight_epoch_and_callbacks_train_the_same_to_the_bit(benchmark, options):
    states, losses = [], []
    for plugins in ([], [EpochsOnly()], [Counting()]):
        strategy = batch_ensemble_lifelong(body(), fit=FIT, plugins=plugins, **options)
        for experience in benchmark.train_stream:
            strategy.train(experience)
        states.append(strategy.network.state_dict())
        losses.append(strategy.epoch_loss)
    for other in states[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in states[0].items())
    assert losses[0] == losses[1] == losses[2] > 0


def test_iteration_callbacks_are_called_for_every_step(benchmark):
    plugin = Counting()
    strategy = finetune(body(), fit=FIT, plugins=[plugin])
    strategy.train(benchmark.train_stream[0])
    assert plugin.calls == strategy.steps_for(len(benchmark.train_stream[0].dataset))
    assert plugin.calls == 2 * -(-len(benchmark.train_stream[0].dataset) // 32)


def test_avalanche_s_evaluator_agrees_with_our_accuracy(benchmark):
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[], strict_checks=False)
    strategy = Strategy(network=finetune(body()).network, fit=FIT, evaluator=evaluator)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    results = strategy.eval(benchmark.test_stream)
    values = {key: value for key, value in results.items() if "Top1_Acc_Exp/eval_phase/test_stream" in key}
    for task, test in enumerate(benchmark.test_stream):
        value = next(value for key, value in values.items() if f"Exp{task:03d}" in key)
        assert value == pytest.approx(accuracy(strategy, [test]), abs=1e-9)


def test_unseen_task_has_no_answers(benchmark):
    strategy = finetune(body(), fit=FIT)
    strategy.train(benchmark.train_stream[0])
    assert predict(strategy, [benchmark.test_stream[1]]) is None
    log_probs, labels = predict(strategy, [benchmark.test_stream[0]])
    assert log_probs.shape == (1, len(labels), strategy.network.classes_per_task[0])
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(1, len(labels)))


def test_fast_weights_have_their_own_learning_rate_and_no_weight_decay(benchmark):
    strategy = batch_ensemble_lifelong(body(), fit=FIT, fast_learning_rate=0.3)
    strategy.train(benchmark.train_stream[0])
    groups = strategy.optimizer.param_groups
    fast = next(group for group in groups if group["weight_decay"] == 0.0)
    assert fast["initial_lr"] == 0.3
    rows = {id(bank) for name, bank in strategy.network.named_parameters() if ".r." in name or ".s." in name}
    assert all(
        id(parameter) not in rows for group in groups if group is not fast for parameter in group["params"]
    )
    assert sum(p.numel() for p in fast["params"]) == 64 + 32 + 32 + 24


def test_nan_loss_names_step_epoch_and_task(benchmark):
    strategy = finetune(body(), fit=Fit(epochs=3, batch_size=32, learning_rate=1e20))
    with pytest.raises(NonFiniteLossError, match=r"step \d+ of \d+, epoch 1, task 1"):
        strategy.train(benchmark.train_stream[0])
    # what measured the first step is gone: a plain product is not counted any more
    assert torch.ones(2, 2).mm(torch.ones(2, 2)).sum() == 8


def test_a_frozen_task_cannot_come_twice(benchmark):
    strategy = batch_ensemble_lifelong(body(), fit=FIT)
    strategy.train(benchmark.train_stream[0])
    with pytest.raises(InputError, match="second time"):
        strategy.train(benchmark.train_stream[0])


def test_joint_sees_all_tasks_at_once(benchmark):
    strategy = joint(body(), fit=Fit(epochs=8, batch_size=32))
    strategy.train(benchmark.train_stream)
    assert strategy.network.num_tasks == 3
    assert all(accuracy(strategy, [test]) > 0.9 for test in benchmark.test_stream)


def test_training_flops_count_every_row_once(benchmark):
    strategy = finetune(body(), fit=FIT)
    strategy.train(benchmark.train_stream[0])
    rows = 2 * len(benchmark.train_stream[0].dataset)
    classes = strategy.network.classes_per_task[0]
    products = 64 * 32 + 32 * 24 + 24 * classes
    assert strategy.meter.flops == pytest.approx(rows * 2 * (3 * products - 64 * 32))


def test_patience_needs_validation_and_goes_back_to_the_best_epoch():
    with_valid = split_digits(num_tasks=2, seed=0, validation=0.2)
    fit = Fit(epochs=20, batch_size=32, patience=2)
    with pytest.raises(InputError, match="--validation"):
        finetune(body(), fit=fit).train(with_valid.train_stream[0])
    strategy = finetune(body(), fit=fit)
    strategy.train(with_valid.train_stream[0], eval_streams=[with_valid.valid_stream[0]])
    assert strategy.clock.train_exp_epochs < 20


@pytest.mark.parametrize(
    "options", [{"amp": True}, {"clip_norm": 0.1}, {"augment": "flip"}, {"optimizer": "adamw"}]
)
def test_every_option_of_training_changes_it_and_still_learns(benchmark, options):
    def weights(fit: Fit) -> torch.Tensor:
        strategy = finetune(body(), fit=fit)
        strategy.train(benchmark.train_stream[0])
        assert accuracy(strategy, [benchmark.test_stream[0]]) > 0.6
        return strategy.network.state_dict()["body.features.1.weight"]

    base = {"epochs": 6, "batch_size": 32, "learning_rate": 0.01}
    assert not torch.equal(weights(Fit(**base)), weights(Fit(**base, **options)))


@pytest.mark.parametrize(
    "build",
    [finetune, independent, batch_ensemble_lifelong, packnet, supsup],
    ids=lambda build: build.__name__,
)
def test_tasks_after_the_second_compile_nothing(benchmark, build, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    torch._dynamo.reset()
    strategy = build(body(), fit=Fit(epochs=2, batch_size=32, compile=True))
    compilations = []
    for experience in split_digits(num_tasks=5, seed=0).train_stream:
        strategy.train(experience)
        compilations.append(counter.frame_count)
    torch._dynamo.reset()
    # whole batches and the last, shorter one; once more where the shared weights are frozen
    assert 0 < compilations[0] <= 2
    assert compilations[1] <= 4
    assert compilations[1:] == [compilations[1]] * 4


@pytest.mark.slow
def test_compiled_training_is_close_to_eager(benchmark):
    results = []
    for compiled in (False, True):
        strategy = batch_ensemble_lifelong(body(), fit=Fit(epochs=2, batch_size=32, compile=compiled))
        for experience in benchmark.train_stream[:2]:
            strategy.train(experience)
        results.append(strategy.network.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-3, atol=1e-4)


def test_a_stock_avalanche_benchmark_trains_too(benchmark):
    from avalanche.benchmarks import nc_benchmark
    from torch.utils.data import TensorDataset

    torch.manual_seed(0)
    labels = torch.arange(4).repeat(40)
    images = torch.randn(160, 1, 8, 8) * 0.1 + labels.view(-1, 1, 1, 1)
    data = TensorDataset(images, labels)
    data.targets = labels.tolist()
    stock = nc_benchmark(data, data, 2, task_labels=True, seed=0, class_ids_from_zero_in_each_exp=True)
    strategy = batch_ensemble_lifelong(body(), fit=Fit(epochs=30, batch_size=16))
    for experience in stock.train_stream:
        strategy.train(experience)
    assert all(accuracy(strategy, [test]) > 0.9 for test in stock.test_stream)


@pytest.mark.parametrize("rule", ["entropy", "max_probability"])
def test_task_inference_equals_asking_every_task_in_turn(benchmark, rule):
    strategy = batch_ensemble_lifelong(body(), fit=Fit(epochs=6, batch_size=32))
    for experience in benchmark.train_stream:
        strategy.train(experience)
    x, y, _ = benchmark.test_stream[1].dataset.batch(torch.arange(len(benchmark.test_stream[1].dataset)))
    network = strategy.network.eval()
    with torch.no_grad():
        probs = [torch.softmax(network(x, task), dim=-1) for task in range(3)]
    if rule == "entropy":
        sure = [(p * p.log()).sum(-1) / torch.tensor(p.shape[1]).log() for p in probs]
    else:
        sure = [p.max(-1).values for p in probs]
    mine = torch.stack(sure).argmax(0) == 1
    found, right = infer_tasks(strategy, benchmark.test_stream[1], rule)
    assert found == pytest.approx(float(mine.double().mean()), abs=0.011)
    assert right == pytest.approx(float((mine & (probs[1].argmax(-1) == y)).double().mean()), abs=0.011)


class Layouts(SupervisedPlugin):
    """Notes how images lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bool] = set()

    def before_forward(self, strategy, *args, **kwargs) -> None:
        self.seen.add(strategy.mb_x.is_contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("build", [finetune, replay])
def test_images_have_their_channels_last_on_a_cpu(build):
    pixels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    stream = from_arrays(pixels, torch.arange(40) % 4, pixels[:8], torch.arange(8) % 4, num_tasks=2)
    for augmentation in ("none", "crop_flip"):
        plugin = Layouts()
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        strategy = build(network, fit=Fit(epochs=1, batch_size=8, augment=augmentation), plugins=[plugin])
        for experience in stream.train_stream:
            strategy.train(experience)
        strategy.eval(stream.test_stream)
        assert plugin.seen == {True}
