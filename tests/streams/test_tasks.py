from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelong_ens.errors import InputError
from streams import from_arrays
from streams.tasks import TaskOptions, hold_out

SETTINGS = settings(max_examples=40, deadline=None)


def numbered_images(labels, first=0):
    """One grey 2x2 image per label that shows its own number in two bytes."""
    numbers = np.arange(first, first + len(labels))
    images = np.zeros((len(labels), 2, 2), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1] = numbers // 256, numbers % 256
    return images


def shown_numbers(dataset):
    data = dataset.image_data
    pixels = data.images[data.rows].long()
    return (pixels[:, 0, 0, 0] * 256 + pixels[:, 0, 0, 1]).tolist()


@given(st.integers(1, 200), st.data(), st.integers(0, 10))
@SETTINGS
def test_classes_are_spread_evenly_each_once(num_classes, data, seed):
    num_tasks = data.draw(st.integers(1, num_classes))
    tasks = TaskOptions(num_tasks, seed).classes_per_task(num_classes)
    assert len(tasks) == num_tasks
    assert sorted(c for task in tasks for c in task) == list(range(num_classes))
    sizes = [len(task) for task in tasks]
    assert max(sizes) - min(sizes) <= 1


@given(
    st.lists(st.integers(2, 7), min_size=1, max_size=12),
    st.data(),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 3),
)
@SETTINGS
def test_every_sample_appears_exactly_once(counts, data, validation, seed):
    num_tasks = data.draw(st.integers(1, len(counts)))
    train = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(seed).shuffle(train)
    test = np.arange(len(counts)).repeat(2)
    benchmark = from_arrays(
        numbered_images(train),
        train,
        numbered_images(test, 1000),
        test,
        num_tasks=num_tasks,
        seed=seed,
        validation=validation,
    )
    labels = np.concatenate([train, test])
    seen = {name: [] for name in benchmark.streams}
    for name, stream in benchmark.streams.items():
        for task, experience in enumerate(stream):
            numbers = shown_numbers(experience.dataset)
            seen[name].extend(numbers)
            own = experience.dataset.image_data.labels.tolist()
            originals = [labels[n if n < 1000 else n - 1000 + len(train)] for n in numbers]
            assert [benchmark.classes[task][label] for label in own] == originals
            assert experience.classes_in_this_experience == list(range(len(benchmark.classes[task])))
    assert sorted(seen["train"] + seen.get("valid", [])) == list(range(len(train)))
    assert sorted(seen["test"]) == list(range(1000, 1000 + len(test)))
    assert ("valid" in seen) == (validation > 0)


def arrays(num_classes=6, per_class=10):
    labels = np.arange(num_classes).repeat(per_class)
    test = np.arange(num_classes).repeat(3)
    return numbered_images(labels), labels, numbered_images(test, 1000), test


def test_order_comes_from_the_seed_or_is_explicit():
    first, again, other = (from_arrays(*arrays(), num_tasks=3, seed=s).classes for s in (1, 1, 2))
    assert first == again != other
    explicit = from_arrays(*arrays(), num_tasks=2, seed=5, class_order=[5, 0, 4, 1, 3, 2])
    assert explicit.classes == [[5, 0, 4], [1, 3, 2]]


def test_validation_does_not_depend_on_order_or_tasks():
    held = []
    for options in ({"num_tasks": 3, "seed": 0}, {"num_tasks": 2, "seed": 9}):
        benchmark = from_arrays(*arrays(), validation=0.2, **options)
        held.append(sorted(n for e in benchmark.valid_stream for n in shown_numbers(e.dataset)))
    assert held[0] == held[1]
    assert len(held[0]) == 12


def test_limit_applies_to_each_class_of_both_parts():
    benchmark = from_arrays(*arrays(), num_tasks=3, limit=2)
    assert [len(e.dataset) for e in benchmark.train_stream] == [4, 4, 4]
    assert [len(e.dataset) for e in benchmark.test_stream] == [4, 4, 4]


def test_global_generators_are_left_alone():
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.get_rng_state(), np.random.get_state()[1].tolist()
    from_arrays(*arrays(), num_tasks=3, validation=0.2)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert np.random.get_state()[1].tolist() == expected[1]


def test_hold_out_keeps_and_holds_at_least_one_of_each_class():
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2])
    for fraction in (0.001, 0.999):
        held = hold_out(labels, fraction)
        for c in range(3):
            assert 0 < held[labels == c].sum() < (labels == c).sum()


@pytest.mark.parametrize("layout", ["NHW", "NCHW", "NHWC", "tensor"])
def test_array_layouts(layout):
    grey = np.random.default_rng(0).integers(0, 256, (8, 5, 6), dtype=np.uint8)
    colour = np.random.default_rng(1).integers(0, 256, (8, 3, 5, 6), dtype=np.uint8)
    images = {
        "NHW": grey,
        "NCHW": colour,
        "NHWC": colour.transpose(0, 2, 3, 1),
        "tensor": torch.from_numpy(colour),
    }
    labels = torch.arange(8) % 2
    benchmark = from_arrays(images[layout], labels, images[layout], labels, num_tasks=1, class_order=[0, 1])
    stored = benchmark.train_stream[0].dataset.image_data
    expected = grey[:, None] if layout == "NHW" else colour
    assert np.array_equal(stored.images[stored.rows].numpy(), expected)
    assert benchmark.image_shape == expected.shape[1:]
    resized = from_arrays(images[layout], labels, images[layout], labels, num_tasks=1, image_size=10)
    assert resized.image_shape[1:] == (10, 10)


def test_batches_are_standardised_by_the_training_images():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (500, 3, 4, 4), dtype=np.uint8)
    labels = np.arange(500) % 2
    benchmark = from_arrays(images, labels, images[:4], labels[:4], num_tasks=1)
    x = benchmark.train_stream[0].dataset.batch(torch.arange(500))[0]
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    constant = np.zeros_like(images)
    flat = from_arrays(constant, labels, constant[:4], labels[:4], num_tasks=1)
    assert flat.train_stream[0].dataset.batch(torch.arange(4))[0].abs().max() == 0


X, Y, TEST_X, TEST_Y = arrays()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tasks": 7}, "num_tasks is 7 but there are 6 classes"),
        ({"num_tasks": 0}, "num_tasks is 0"),
        ({"validation": 1.0}, "validation is 1.0"),
        ({"validation": -0.1}, "validation is -0.1"),
        ({"validation": float("nan")}, "validation is nan"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": 1, "validation": 0.5}, "one sample"),
        ({"image_size": 0}, "image_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"class_order": [0, 1, 2, 3, 4, 4]}, "class_order"),
        ({"class_order": [0, 1]}, "class_order"),
        ({"train_images": X.astype(np.float32)}, "dtype float32"),
        ({"train_images": X[:0], "train_labels": Y[:0]}, "at least one image"),
        ({"train_images": X[:, 0]}, "shape"),
        ({"train_images": np.zeros((60, 9, 9, 9), np.uint8)}, "channels"),
        ({"train_labels": Y[:-1]}, "train_labels"),
        ({"train_labels": Y * 1.0}, "train_labels"),
        ({"test_images": TEST_X[:, :1]}, "one shape"),
        ({"test_labels": TEST_Y + 1}, "class 6 in the test images but not in the training images"),
        ({"test_labels": TEST_Y * 0}, "classes 1, 2, 3 and 2 more without any test image"),
    ],
)
def test_bad_input_is_one_line(changes, message):
    arguments = {"train_images": X, "train_labels": Y, "test_images": TEST_X, "test_labels": TEST_Y} | changes
    with pytest.raises(InputError) as caught:
        from_arrays(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
