from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import streams
from lifelong_ens.training.data import ImageData
from streams.benchmark import StreamDataset, make_benchmark
from streams.transforms import Permute, Rotate


def store(n=40, shape=(3, 4, 4), seed=0):
    return torch.randint(
        0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def image_data(images, rows, num_classes=2, **kwargs):
    rows = torch.as_tensor(rows)
    channels = images.shape[1]
    return ImageData(
        images,
        rows,
        rows % num_classes,
        torch.full((channels,), 100.0),
        torch.full((channels,), 50.0),
        **kwargs,
    )


@pytest.fixture
def benchmark():
    images = store()
    train = [image_data(images, range(10 * t, 10 * t + 10)) for t in range(3)]
    test = [image_data(images, range(30 + 3 * t, 33 + 3 * t)) for t in range(3)]
    return make_benchmark(train, test, test, classes=[[4, 1], [0, 2], [5, 3]], name="made_up")


def same(dataset, index):
    """A batch equals its samples one by one."""
    images, labels, tasks = dataset.batch(torch.as_tensor(index))
    for k, i in enumerate(index):
        image, label, task = dataset[i]
        assert torch.equal(images[k], image)
        assert (int(labels[k]), int(tasks[k])) == (label, task)


def test_import_is_cheap():
    code = "import sys, streams; from streams import *; assert not {'avalanche', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code.replace("from streams import *; ", "")], check=True)


def test_every_builder_imports_without_torch():
    code = (
        "import sys, streams\nfor name in streams.BUILDERS: assert callable(getattr(streams, name)), name\n"
        "assert not {'avalanche', 'torch', 'numpy', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(streams.__all__) == {"BUILDERS", *streams.BUILDERS}
    with pytest.raises(AttributeError):
        _ = streams.no_such_builder


def test_experiences(benchmark):
    assert (benchmark.name, benchmark.image_shape) == ("made_up", (3, 4, 4))
    assert benchmark.classes == [[4, 1], [0, 2], [5, 3]]
    assert benchmark.class_names[0] == ["4", "1"]
    assert set(benchmark.streams) == {"train", "test", "valid"}
    for stream in benchmark.streams.values():
        for task, experience in enumerate(stream):
            assert experience.task_labels == [task]
            assert experience.task_label == task
            assert experience.current_experience == task
            assert experience.classes_in_this_experience == [0, 1]
            assert isinstance(experience.dataset, StreamDataset)


def test_tasks_share_classes_only_where_that_is_said():
    data = [image_data(store(), range(10)), image_data(store(), range(9), num_classes=3)]
    assert make_benchmark(data, data).classes == [[0, 1], [2, 3, 4]]
    assert make_benchmark(data, data, classes=[[0, 1], [0, 1, 2]]).classes == [[0, 1], [0, 1, 2]]


def test_without_validation_there_is_no_third_stream():
    data = [image_data(store(), range(10))]
    benchmark = make_benchmark(data, data)
    assert set(benchmark.streams) == {"train", "test"}
    assert benchmark.valid_stream is None


def test_batches_equal_samples_through_trains_subsets_and_concatenations(benchmark):
    a, b, c = (experience.dataset for experience in benchmark.train_stream)
    same(a, [3, 0, 9, 3])
    same(a.train().eval(), [1, 2])
    subset = b.subset([9, 1, 1, 4]).subset(torch.tensor([3, 0, 1]))
    same(subset, [0, 1, 2])
    joined = subset.concat(a).concat(c.subset(range(5))).train()
    same(joined, [17, 0, 2, 1, 3, 12, 13, 17])
    again = joined.subset(list(range(17, -1, -1))).concat(joined).eval()
    same(again, list(range(len(again))))
    same(a + b, [0, 19])
    for dataset in (subset, joined, again, a + b):
        assert isinstance(dataset, StreamDataset)
        assert dataset.image_data is not None


def test_slices_are_datasets(benchmark):
    part = benchmark.train_stream[1].dataset[2:8:2]
    assert isinstance(part, StreamDataset)
    assert len(part) == 3
    same(part, [0, 2])


def test_stores_and_transforms_mix():
    first, second = store(seed=1), store(20, seed=2)
    permuted = Permute(torch.randperm(16, generator=torch.Generator().manual_seed(3)))
    parts = [
        StreamDataset.from_images(image_data(first, range(10)), 0),
        StreamDataset.from_images(image_data(second, range(5, 15)), 1),
        StreamDataset.from_images(image_data(first, range(10, 20), transform=permuted), 2),
    ]
    joined = parts[0].concat(parts[1]).concat(parts[2]).subset([29, 0, 15, 3, 22, 11])
    assert joined.image_data is None
    same(joined, [5, 0, 1, 4, 2, 3, 0])
    assert joined.batch(torch.arange(6))[2].tolist() == [2, 0, 1, 0, 2, 1]


def test_batches_are_those_of_single_reads(benchmark):
    whole = benchmark.train_stream[0].dataset.concat(benchmark.train_stream[1].dataset)
    other = StreamDataset.from_images(image_data(store(20, seed=2), range(5, 15)), 2)
    transformed = benchmark.train_stream[0].dataset.replace_current_transform_group((torch.neg, None))
    for dataset in (whole, whole.concat(other), transformed):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:8]
        batches = list(dataset.batches(order, 3))
        assert [len(labels) for _, labels, _ in batches] == [3, 3, 2]
        for (images, labels, tasks), index in zip(batches, order.split(3), strict=True):
            expected = dataset.batch(index)
            assert torch.equal(images, expected[0])
            assert torch.equal(labels, expected[1])
            assert torch.equal(tasks, expected[2])


def test_an_avalanche_transform_is_respected(benchmark):
    dataset = benchmark.train_stream[0].dataset.replace_current_transform_group((torch.neg, None))
    plain = benchmark.train_stream[0].dataset
    index = torch.tensor([4, 1])
    assert torch.equal(dataset.batch(index)[0], -plain.batch(index)[0])


def test_changed_task_labels_are_seen(benchmark):
    dataset = benchmark.train_stream[0].dataset
    dataset.batch(torch.tensor([0]))
    changed = dataset.update_data_attribute("targets_task_labels", [7] * len(dataset))
    assert changed.batch(torch.tensor([0, 1]))[2].tolist() == [7, 7]
    assert dataset.batch(torch.tensor([0, 1]))[2].tolist() == [0, 0]


def test_data_loader_gathers_whole_batches(benchmark):
    dataset = benchmark.train_stream[2].dataset
    loaded = list(DataLoader(dataset, batch_size=4, collate_fn=dataset.collate_fn))
    plain = list(DataLoader(dataset, batch_size=4))
    expected = dataset.batch(torch.arange(4))
    for batch in (loaded[0], plain[0]):
        assert all(torch.equal(x, y) for x, y in zip(batch, expected, strict=True))
    assert sum(len(batch[0]) for batch in loaded) == 10


def test_extra_columns_come_along(benchmark):
    from avalanche.benchmarks.utils.data_attribute import DataAttribute

    dataset = benchmark.train_stream[0].dataset
    extra = DataAttribute([torch.full((2,), float(i)) for i in range(10)], "logits", use_in_getitem=True)
    dataset = dataset.update_data_attribute("logits", extra)
    columns = dataset.__getitems__([3, 1]).columns
    assert columns[3].tolist() == [[3.0, 3.0], [1.0, 1.0]]
    assert len(dataset[0]) == 4


def test_datasets_and_transforms_pickle(benchmark):
    dataset = pickle.loads(pickle.dumps(benchmark.train_stream[0].dataset))
    same(dataset, [0, 9])
    rotate = Rotate(90.0, (0.0,))
    assert pickle.loads(pickle.dumps(rotate)) == rotate


def test_rotation_and_permutation():
    images = torch.rand(2, 1, 6, 6)
    turned = Rotate(90.0, (0.0,))(images)
    torch.testing.assert_close(turned, images.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    wide = Rotate(180.0, (0.5,))(torch.rand(1, 1, 4, 8).clone())
    assert wide.shape == (1, 1, 4, 8)
    corner = Rotate(45.0, (-3.0,))(images)[:, :, 0, 0]
    torch.testing.assert_close(corner, torch.full((2, 1), -3.0))
    index = torch.randperm(36)
    assert torch.equal(Permute(index)(images).flatten(), images.flatten(2)[..., index].flatten())


def _model():
    from avalanche.models import MultiHeadClassifier, MultiTaskModule

    class Net(MultiTaskModule):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(48, 8)
            self.head = MultiHeadClassifier(8)

        def forward(self, x, task_labels):
            return self.head(self.body(x.flatten(1)).relu(), task_labels)

    return Net()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Naive", "EWC", "Replay"])
def test_avalanche_strategies_run(benchmark, kind):
    from avalanche.training import supervised
    from avalanche.training.plugins import EvaluationPlugin

    model = _model()
    options = {"Naive": {}, "EWC": {"ewc_lambda": 1.0}, "Replay": {"mem_size": 8}}[kind]
    strategy = getattr(supervised, kind)(
        model=model,
        criterion=torch.nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_mb_size=4,
        evaluator=EvaluationPlugin(loggers=[]),
        **options,
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream[: experience.current_experience + 1])
    assert set(model.head.classifiers) == {"0", "1", "2"}
    if kind == "Replay":
        buffer = strategy.plugins[0].storage_policy.buffer
        whole = StreamDataset([buffer])
        same(whole, list(range(len(whole))))
        assert sorted(set(whole.batch(torch.arange(len(whole)))[2].tolist())) == [0, 1, 2]
