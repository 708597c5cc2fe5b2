"""Streams whose images stay in their files."""

from __future__ import annotations

import json
import logging
import os
import pickle
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from experiments.cli import main
from lifelong_ens.errors import InputError
from strategies.loader import BatchLoader, together
from streams import cache, folders, image_folder, split_imagenet, store
from streams.cache import Storage
from streams.files import ImageFiles


@pytest.fixture
def imagenet(tmp_path, write_image):
    """ImageNet's layout: 4 classes of 9 training and 2 test JPEGs, each of another size."""
    root = tmp_path / "imagenet"
    for number in range(4):
        for part, count in (("train", 9), ("val", 2)):
            for i in range(count):
                path = root / part / f"n{number:08}" / f"n{number:08}_{i}.JPEG"
                write_image(path, 100 * number + i + 50 * (part == "val"), size=(20 + 3 * i, 31 - number))
    return root


@pytest.fixture(autouse=True)
def threaded(monkeypatch):
    """As many threads as were asked for, small as the files are."""
    monkeypatch.setattr(folders, "_THREADED_BYTES", 0)


def build(root, **options):
    return split_imagenet(root=root, num_tasks=2, image_size=14, **options)


def batches(dataset, batch_size=4, seed=None, augmentation="none"):
    """Two passes over a dataset."""
    loader = BatchLoader(dataset, batch_size, torch.device("cpu"), seed, augmentation)
    return [[part.clone() for part in batch] for _ in range(2) for batch in loader]


def equal(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_files_give_the_bits_that_the_cache_gives_in_every_way_of_reading(imagenet, cache_folder, workers):
    files = build(imagenet, storage="files", workers=workers, validation=0.2)
    assert not cache_folder.exists()
    cached = build(imagenet, validation=0.2)
    assert files.image_shape == cached.image_shape == (3, 14, 14)
    for name in ("train", "valid", "test"):
        ours, theirs = files.streams[name], cached.streams[name]
        for one, other in zip(ours, theirs, strict=True):
            assert equal(batches(one.dataset), batches(other.dataset))
        assert equal(batches(together(ours).dataset), batches(together(theirs).dataset))
        assert equal(*(batches(stream[0].dataset.subset([1, 0, 1])) for stream in (ours, theirs)))
        assert torch.equal(ours[1].dataset[1][0], theirs[1].dataset[1][0])


def test_order_crops_and_flips_do_not_depend_on_the_workers(imagenet):
    seen = [
        batches(build(imagenet, storage="files", workers=n).train_stream[0].dataset, 5, 3, "crop_flip")
        for n in (0, 1, 4)
    ]
    assert equal(seen[0], seen[1])
    assert equal(seen[0], seen[2])


def test_means_are_of_a_fixed_sample_where_there_are_many(imagenet, monkeypatch):
    exact = build(imagenet, storage="files").train_stream[0].dataset.image_data
    monkeypatch.setattr(store, "STATISTICS_IMAGES", 12)
    sample = build(imagenet, storage="files").train_stream[0].dataset.image_data
    wanted = sample.images.index_select(0, torch.arange(0, 36, 3)).double()
    torch.testing.assert_close(sample.mean.double(), wanted.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(sample.std.double(), wanted.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(sample.mean, exact.mean, rtol=0, atol=10)


def numbered(count, workers, read=None):
    """Files whose image is their number, and the list of those that were decoded."""
    decoded = []

    def decode(path, content):
        decoded.append(int(path))
        return np.full((1, 1, 1), int(path) % 256, dtype=np.uint8) if read is None else read(path)

    return ImageFiles([str(i) for i in range(count)], decode, (1, 1, 1), workers), decoded


def test_small_files_are_decoded_by_one_thread(imagenet, monkeypatch):
    monkeypatch.setattr(folders, "_THREADED_BYTES", 16_000)
    earlier = set(threading.enumerate())
    dataset = build(imagenet, storage="files", workers=4).train_stream[0].dataset
    assert len(batches(dataset, 18)) == 2
    assert len(set(threading.enumerate()) - earlier) == 1


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 10), (2, 50), (3, 4)])
def test_few_images_are_decoded_ahead(workers, batch_size):
    files, decoded = numbered(400, workers)
    ahead = []
    given = 0
    for images in files.read_ahead(torch.arange(400).split(batch_size)):
        given += len(images)
        if given <= 5 * batch_size:
            time.sleep(0.02)
        ahead.append(len(decoded) - given)
    assert given == len(decoded) == 400
    assert max(ahead) < 2 * batch_size + 2 * 8 * workers
    assert (max(ahead) > 0) == (workers > 0)


def test_threads_stay_over_epochs_tasks_and_passes_within_passes(imagenet):
    earlier = set(threading.enumerate())
    train, other = (e.dataset for e in build(imagenet, storage="files", workers=2).train_stream)
    alone = batches(other)
    used = set(threading.enumerate()) - earlier
    nested = []
    for _ in BatchLoader(train, 4, torch.device("cpu")):
        nested = batches(other)
        next(iter(BatchLoader(other, 4, torch.device("cpu"))))
    assert equal(nested, alone)
    after = set(threading.enumerate()) - earlier
    assert used <= after
    assert 0 < len(after) <= 2


def test_other_processes_decode_too(imagenet):
    dataset = build(imagenet, storage="files", workers=2).train_stream[0].dataset
    expected = batches(dataset)[0][0]
    images = next(iter(DataLoader(dataset, 4, num_workers=1, collate_fn=dataset.collate_fn)))[0]
    assert torch.equal(images, expected)
    data = dataset.image_data.images
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.index_select(0, torch.arange(3)), data.index_select(0, torch.arange(3)))


@pytest.mark.parametrize("workers", [0, 3])
def test_the_first_damaged_file_is_named_and_others_can_be_read(imagenet, workers, monkeypatch):
    monkeypatch.setattr(store, "STATISTICS_IMAGES", 1)
    for name in ("val/n00000002/n00000002_1.JPEG", "val/n00000001/n00000001_0.JPEG"):
        content = (imagenet / name).read_bytes()
        (imagenet / name).write_bytes(content[: len(content) // 2])
    data = build(imagenet, storage="files", workers=workers).test_stream[0].dataset.image_data.images
    rows = torch.arange(36, 44)
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            list(data.read_ahead(rows.split(2)))
        assert "n00000001_0.JPEG cannot be decoded" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert data.index_select(0, torch.tensor([36, 39])).shape == (2, 3, 14, 14)


def test_nothing_more_is_decoded_when_a_pass_is_given_up():
    def slow(path, content=None):
        time.sleep(0.01)
        return np.zeros((1, 1, 1), dtype=np.uint8)

    files, decoded = numbered(1000, 1, slow)
    reading = files.read_ahead([torch.arange(1), torch.arange(1000)])
    next(reading)
    reading.close()
    files.index_select(0, torch.tensor([5]))
    assert len(decoded) < 30


def test_a_run_that_met_a_damaged_file_goes_on_with_other_workers_to_the_same_bits(
    class_folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(store, "STATISTICS_IMAGES", 1)
    command = ["compare", "--stream", "image_folder", "--root", str(class_folders), "--num_tasks", "2"]
    command += ["--image_size", "8", "--storage", "files", "--network", "mlp", "--strategies", "finetune"]
    command += ["--epochs", "2", "--augment", "flip", "--device", "cpu", "--class_order", "[0,1,2,3,4]"]
    assert main([*command, "--workers", "0", "--out", str(tmp_path / "whole")]) == 0
    bad = class_folders / "train" / "elk" / "3.png"
    content = bad.read_bytes()
    bad.write_bytes(content[:60])
    capsys.readouterr()
    assert main([*command, "--workers", "1", "--out", str(tmp_path / "again")]) == 2
    assert "elk/3.png cannot be decoded" in capsys.readouterr().err
    assert list((tmp_path / "again").rglob("task_0001.safetensors"))
    bad.write_bytes(content)
    assert main([*command, "--workers", "3", "--out", str(tmp_path / "again")]) == 0
    records = [
        json.loads(next((tmp_path / out / "records").glob("*.json")).read_text())
        for out in ("whole", "again")
    ]
    assert records[0]["state_sha256"] == records[1]["state_sha256"]
    assert records[0]["accuracy"] == records[1]["accuracy"]
    assert records[0]["stream"]["options"] == records[1]["stream"]["options"]
    assert "workers" not in records[0]["stream"]["options"]


def test_what_does_not_fit_is_refused_with_what_it_needs_and_what_helps(
    imagenet, cache_folder, monkeypatch, caplog
):
    with pytest.raises(
        InputError, match=r"44 decoded images need 0\.0 GB, more than cache_gb, 1e-06; .*storage=files"
    ):
        build(imagenet, cache_gb=1e-6)
    assert not cache_folder.exists()
    assert build(imagenet, cache_gb=1.0).image_shape == (3, 14, 14)
    next(cache_folder.iterdir()).unlink()
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: cache.shutil._ntuple_diskusage(9, 9, 0))
    monkeypatch.setattr(store.os, "sysconf", lambda _: 10)
    with caplog.at_level(logging.ERROR), pytest.raises(InputError, match=r"need 0\.0 GB.*storage=files"):
        build(imagenet)
    assert build(imagenet, storage="files", cache_gb=0).image_shape == (3, 14, 14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "workers is -1; expected 0 or more threads"),
        ({"kind": "disk"}, "storage is disk; expected cache or files"),
        ({"cache_gb": float("nan")}, "cache_gb is nan"),
        ({"cache_gb": -1.0}, "cache_gb is -1"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(InputError, match=message):
        Storage(**options)


def test_missing_folders_are_refused_as_with_a_cache(tmp_path, imagenet):
    for storage in ("cache", "files"):
        with pytest.raises(InputError, match="is not a readable folder"):
            build(tmp_path / "absent", storage=storage)
        with pytest.raises(InputError, match="holds no class folders"):
            build(imagenet / "train", storage=storage)


def test_reading_bytes_of_a_cache_one_by_one_is_refused(class_folders):
    plan = store.from_blocks([np.zeros((2, 1, 4, 4), np.uint8)], np.zeros(2, np.int64), 1, ("a",))
    with pytest.raises(ValueError, match="only all together"):
        store.from_reader(plan)


def test_paths_of_any_bytes(tmp_path, write_image):
    root = tmp_path / "odd"
    for part in ("train", "test"):
        for name in ("ä ö", "日本"):
            write_image(root / part / name / "1.png", 1)
            os.rename(root / part / name / "1.png", os.fsencode(root / part / name) + b"/\xff.png")
    stream = partial(image_folder, root=root, num_tasks=1, image_size=8)
    left, right = (stream(storage=kind).test_stream[0].dataset for kind in ("files", "cache"))
    assert equal(batches(left), batches(right))
