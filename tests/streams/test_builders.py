from __future__ import annotations

import inspect
import os
import typing
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

import streams
from lifelong_ens.errors import InputError
from streams import (
    permuted_mnist,
    rotated_mnist,
    split_cifar10,
    split_cifar100,
    split_digits,
    split_fashion_mnist,
    split_mnist,
)


@pytest.fixture
def made_up_mnist(tmp_path):
    """MNIST's files with 40 training and 20 test images of 28x28, under both of torchvision's folders."""
    rng = np.random.default_rng(0)
    for name in ("MNIST", "FashionMNIST"):
        folder = tmp_path / "data" / name / "raw"
        folder.mkdir(parents=True)
        for part, count in (("train", 40), ("t10k", 20)):
            images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            header = np.array([0x803, count, 28, 28], dtype=">u4").tobytes()
            (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
            header = np.array([0x801, count], dtype=">u4").tobytes()
            labels = (np.arange(count) % 10).astype(np.uint8)
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return tmp_path / "data"


@pytest.mark.parametrize("name", [n for n in streams.BUILDERS if n != "from_arrays"])
def test_arguments_are_plain_and_documented(name):
    builder = getattr(streams, name)
    documented = inspect.getdoc(builder).split("Args:")[1]
    module = inspect.getmodule(builder)
    for argument in inspect.signature(builder).parameters.values():
        assert argument.kind is argument.KEYWORD_ONLY
        assert f"\n    {argument.name}: " in documented
        annotation = eval(argument.annotation, vars(module))
        if typing.get_origin(annotation) is typing.Literal:
            annotation = str
        kinds = {typing.get_origin(kind) or kind for kind in typing.get_args(annotation) or [annotation]}
        assert kinds <= {str, Path, int, float, bool, list, type(None)}
    common = {"num_tasks", "seed", "validation", "image_size", "limit"}
    assert common <= set(inspect.signature(builder).parameters)


def test_digits():
    benchmark = split_digits()
    assert (benchmark.name, benchmark.image_shape) == ("split_digits", (1, 8, 8))
    assert sum(len(e.dataset) for e in benchmark.train_stream) == 1347
    assert sum(len(e.dataset) for e in benchmark.test_stream) == 450
    assert [len(c) for c in benchmark.classes] == [2] * 5


def test_digits_test_images_do_not_depend_on_the_seed():
    def test_pixels(seed):
        benchmark = split_digits(seed=seed, num_tasks=3)
        parts = [e.dataset.image_data for e in benchmark.test_stream]
        return torch.cat([p.images[p.rows] for p in parts]).flatten(1).sort(0).values

    assert torch.equal(test_pixels(0), test_pixels(1))


def test_torchvision_files(made_up_mnist):
    for builder in (split_mnist, split_fashion_mnist):
        benchmark = builder(root=made_up_mnist, num_tasks=3)
        assert sorted(len(e.dataset) for e in benchmark.train_stream) == [12, 12, 16]
        assert benchmark.image_shape == (1, 28, 28)
        assert benchmark.name == builder.__name__
    assert split_mnist(root=made_up_mnist, image_size=32).image_shape == (1, 32, 32)


def test_permuted_tasks_hold_the_same_pixels(made_up_mnist):
    benchmark = permuted_mnist(root=made_up_mnist, num_tasks=3, validation=0.25, seed=4)
    assert benchmark.classes == [list(range(10))] * 3
    index = torch.arange(5)
    batches = [e.dataset.batch(index)[0] for e in benchmark.train_stream]
    plain = split_mnist(root=made_up_mnist, num_tasks=1, class_order=list(range(10)), validation=0.25)
    assert torch.equal(batches[0], plain.train_stream[0].dataset.batch(index)[0])
    assert not torch.equal(batches[1], batches[2])
    for moved in batches[1:]:
        assert torch.equal(moved.flatten(1).sort().values, batches[0].flatten(1).sort().values)
    again = permuted_mnist(root=made_up_mnist, num_tasks=3, validation=0.25, seed=4)
    assert torch.equal(again.train_stream[2].dataset.batch(index)[0], batches[2])
    test = benchmark.test_stream[1].dataset
    assert torch.equal(
        test.image_data.transform.index, benchmark.train_stream[1].dataset.image_data.transform.index
    )
    assert [len(e.dataset) for e in benchmark.valid_stream] == [10] * 3


def test_rotated_tasks(made_up_mnist):
    benchmark = rotated_mnist(root=made_up_mnist, num_tasks=4)
    index = torch.arange(4)
    batches = [e.dataset.batch(index)[0] for e in benchmark.train_stream]
    torch.testing.assert_close(batches[2], batches[0].rot90(1, (2, 3)), atol=1e-3, rtol=0)
    with pytest.raises(InputError, match="max_angle"):
        rotated_mnist(root=made_up_mnist, max_angle=0)


@pytest.mark.parametrize(
    ("builder", "file"),
    [
        (split_mnist, "MNIST/raw"),
        (permuted_mnist, "MNIST/raw"),
        (split_fashion_mnist, "FashionMNIST/raw"),
        (split_cifar10, "cifar-10-batches-py"),
        (split_cifar100, "cifar-100-python"),
    ],
)
def test_missing_files_without_network_are_one_line(builder, file, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(InputError) as caught:
        builder(root=tmp_path / "data")
    message = str(caught.value)
    assert f"not found in {tmp_path}/data/{file}" in message
    assert "network" in message
    assert "\n" not in message
    assert not (tmp_path / "data").exists()


def test_damaged_files_are_named(made_up_mnist, cache_folder):
    file = made_up_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"MNIST's files in .* are damaged"):
        split_mnist(root=made_up_mnist)
    assert not cache_folder.exists() or not list(cache_folder.iterdir())


def test_bad_options_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match="11 but there are 10 classes"):
        split_mnist(root=tmp_path / "absent", num_tasks=11)
    with pytest.raises(InputError, match="101 but there are 100 classes"):
        split_cifar100(root=tmp_path / "absent", num_tasks=101)


@pytest.mark.data
def test_real_mnist(unpacked):
    root = unpacked("mnist")
    benchmark = split_mnist(root=root, validation=0.1)
    counts = {name: sum(len(e.dataset) for e in s) for name, s in benchmark.streams.items()}
    assert counts["train"] + counts["valid"] == 60_000
    assert counts["test"] == 10_000
    data = benchmark.train_stream[0].dataset.image_data
    assert data.mean.item() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert data.std.item() / 255 == pytest.approx(0.3081, abs=1e-4)
    assert os.environ["LIFELONG_ENS_CACHE"]
