"""What is remembered of earlier tasks: which images, in how many bytes, and how they come back."""

from __future__ import annotations

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.core import SupervisedPlugin
from torch import nn
from torch.utils.data import TensorDataset

from lifelong_ens.accounting.components import Size
from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import mlp
from lifelong_ens.training.data import ImageData
from lifelong_ens.training.fit import Fit
from strategies import agem, finetune, gem, replay
from strategies.costs import component_sizes
from strategies.evaluation import accuracy
from strategies.memory import Memory, balanced_order
from streams import split_digits
from streams.benchmark import make_benchmark
from streams.transforms import Permute, Rotate

FIT = Fit(epochs=1, batch_size=32)


@pytest.fixture(scope="module")
def benchmark():
    return split_digits(num_tasks=5, seed=0)


def body(shape: tuple[int, int, int] = (1, 8, 8)) -> nn.Module:
    torch.manual_seed(0)
    return mlp(input_shape=shape, hidden=(16,))


def stream(transforms, channels: int = 3, images: int = 40):
    """Tasks of random colour images, four classes each, seen through transforms."""
    torch.manual_seed(0)
    tasks = []
    for task, transform in enumerate(transforms):
        pixels = torch.randint(0, 256, (images, channels, 8, 8), dtype=torch.uint8)
        mean, std = torch.rand(channels) * 200 + task, torch.rand(channels) * 50 + 20
        labels = torch.arange(images) % 4
        tasks.append(ImageData(pixels, torch.arange(images), labels, mean, std, transform))
    return make_benchmark(tasks, tasks)


@pytest.mark.parametrize("build", [replay, agem, gem])
@pytest.mark.parametrize("memory", [0, 3, 23, 100])
def test_memory_is_bounded_shared_and_exactly_what_the_ledger_says(benchmark, build, memory):
    strategy = build(body(), fit=FIT, memory=memory)
    held = strategy.network.memory
    for task, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        counts = held.tasks.bincount(minlength=task + 1)[: task + 1]
        assert counts.sum() == len(held) == memory
        assert counts.max() - counts.min() <= 1
        for one in range(task + 1):
            classes = held.labels[held.tasks == one].bincount(minlength=len(benchmark.classes[one]))
            assert classes.max() - classes.min() <= 1
        per_task = 2 * 4 * (min(memory, task + 1) if memory < 5 else task + 1)
        expected = memory * (64 + 4 + 4) + per_task if memory else 0
        assert component_sizes(strategy).get("buffer", Size()) == Size(0, expected)


def test_plugins_buffers_come_on_top_in_the_ledger(benchmark):
    class Keeps(SupervisedPlugin):
        def __init__(self) -> None:
            super().__init__()
            self.kept = torch.zeros(10)

    strategy = replay(body(), fit=FIT, memory=10, plugins=[Keeps()])
    strategy.train(benchmark.train_stream[0])
    assert component_sizes(strategy)["buffer"] == Size(0, 10 * 72 + 8 + 40)


def test_any_beginning_of_the_order_is_balanced_over_classes():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 20 + [1] * 30 + [2] * 4)
    order = balanced_order(labels, generator)
    assert sorted(order.tolist()) == list(range(54))
    for count in range(1, 13):
        found = labels[order[:count]].bincount(minlength=3)
        assert found.max() - found.min() <= 1
    # the small class is used up, the others go on
    assert labels[order[:44]].bincount().tolist() == [20, 20, 4]
    assert not torch.equal(order, balanced_order(labels, generator))


def test_an_earlier_task_keeps_the_images_it_drew_first(benchmark):
    strategy = replay(body(), fit=FIT, memory=50)
    strategy.train(benchmark.train_stream[0])
    before = strategy.network.memory.images.clone()
    strategy.train(benchmark.train_stream[1])
    assert torch.equal(strategy.network.memory.images[:25], before[:25])


def remembered_equals_stream(strategy, benchmark) -> None:
    memory = strategy.network.memory
    images, labels, tasks = memory.batch(torch.arange(len(memory)))
    for task, experience in enumerate(benchmark.train_stream):
        x, y, _ = experience.dataset.batch(torch.arange(len(experience.dataset)))
        for image, label in zip(images[tasks == task], labels[tasks == task], strict=True):
            same = (x == image).flatten(1).all(dim=1)
            assert same.any()
            assert y[same.nonzero()[0]] == label


def test_bytes_come_back_as_the_stream_gives_them_to_the_bit():
    torch.manual_seed(1)
    benchmark = stream([None, Permute(torch.randperm(64)), Permute(torch.randperm(64))])
    strategy = replay(body((3, 8, 8)), fit=FIT, memory=30)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    assert strategy.network.memory.images.dtype == torch.uint8
    remembered_equals_stream(strategy, benchmark)


def test_what_is_not_bytes_is_stored_as_floats():
    benchmark = stream([None, Rotate(30.0, (0.0, 0.0, 0.0)), None])
    strategy = replay(body((3, 8, 8)), fit=FIT, memory=30)
    for task, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        pixel_bytes, scales = (1, 24) if task == 0 else (4, 0)
        assert component_sizes(strategy)["buffer"].bytes == 30 * (192 * pixel_bytes + 8) + scales
    remembered_equals_stream(strategy, benchmark)


@pytest.mark.parametrize("transform", [None, Rotate(30.0, (0.0, 0.0, 0.0))])
def test_state_loads_into_a_regrown_network_whatever_its_memory(transform):
    benchmark = stream([transform, transform])
    strategy = replay(body((3, 8, 8)), fit=FIT, memory=30)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    other = replay(body((3, 8, 8)), memory=7).network.regrow(strategy.network.classes_per_task)
    other.load_state_dict(strategy.network.state_dict())
    rows = torch.arange(30)
    for found, expected in zip(other.memory.batch(rows), strategy.network.memory.batch(rows), strict=True):
        assert torch.equal(found, expected)


class Rows(SupervisedPlugin):
    """Notes the task labels of every mini-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = []

    def after_training_iteration(self, strategy, *args, **kwargs) -> None:
        self.batches.append(strategy.mb_task_id.clone())


def test_replay_joins_every_new_row_with_a_remembered_one(benchmark):
    plugin = Rows()
    strategy = replay(body(), fit=Fit(epochs=2, batch_size=50), memory=40, plugins=[plugin])
    for task in range(3):
        plugin.batches.clear()
        strategy.train(benchmark.train_stream[task])
        size = len(benchmark.train_stream[task].dataset)
        new = [min(50, size - start) for start in range(0, size, 50)] * 2
        assert [int((labels == task).sum()) for labels in plugin.batches] == new
        old = [int((labels < task).sum()) for labels in plugin.batches]
        assert old == [min(count, 40) if task else 0 for count in new]
    assert set(torch.cat(plugin.batches).tolist()) == {0, 1, 2}


def test_replayed_rows_are_counted(benchmark):
    fit = Fit(epochs=1, batch_size=50)
    flops = []
    for build in (finetune, lambda *args, **kwargs: replay(*args, memory=1000, **kwargs)):
        strategy = build(body(), fit=fit)
        for experience in benchmark.train_stream[:2]:
            strategy.train(experience)
            flops.append(strategy.meter.flops)
    assert flops[0] == flops[2]
    # every task has two classes, so that old rows cost what new ones do
    assert flops[3] - flops[2] == pytest.approx(2 * (flops[1] - flops[0]))


def test_a_task_that_comes_again_replaces_its_images_and_is_not_replayed(benchmark):
    plugin = Rows()
    strategy = replay(body(), fit=FIT, memory=40, plugins=[plugin])
    for task in (0, 1, 0):
        plugin.batches.clear()
        strategy.train(benchmark.train_stream[task])
    assert strategy.network.memory.tasks.bincount().tolist() == [20, 20]
    # as many rows of the other task as new ones, until there are no more
    size = len(benchmark.train_stream[0].dataset)
    assert int((torch.cat(plugin.batches) == 0).sum()) == size


@pytest.mark.parametrize("build", [replay, agem, gem])
def test_a_stock_avalanche_benchmark_is_remembered_as_floats(build):
    torch.manual_seed(0)
    labels = torch.arange(4).repeat(40)
    images = torch.randn(160, 1, 8, 8) * 0.3 + torch.randn(4, 1, 8, 8)[labels]
    data = TensorDataset(images, labels)
    data.targets = labels.tolist()
    stock = nc_benchmark(data, data, 2, task_labels=True, seed=0, class_ids_from_zero_in_each_exp=True)
    strategy = build(body(), fit=Fit(epochs=20, batch_size=16), memory=20)
    for experience in stock.train_stream:
        strategy.train(experience)
    assert strategy.network.memory.images.dtype == torch.float32
    assert all(accuracy(strategy, [test]) > 0.9 for test in stock.test_stream)


@pytest.mark.parametrize("build", [replay, agem, gem])
def test_a_negative_memory_is_refused(build):
    with pytest.raises(InputError, match="memory is at least 0"):
        build(body(), memory=-1)


def test_an_empty_memory_has_no_bytes():
    assert sum(buffer.numel() for buffer in Memory().buffers()) == 0
