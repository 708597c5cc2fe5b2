from __future__ import annotations

import errno
import json
import logging
import os
import struct

import pytest
import torch
from safetensors import safe_open

from lifelong_ens.errors import InputError
from streams import cache, split_cifar100, store


@pytest.fixture
def decoded(monkeypatch):
    """Counts how often images were decoded."""
    calls = []
    original = store.decode

    def counted(plan, name):
        calls.append(name)
        return original(plan, name)

    monkeypatch.setattr(cache, "decode", counted)
    monkeypatch.setattr(store, "decode", counted)
    return calls


def pixels(root, **options):
    benchmark = split_cifar100(root=root, num_tasks=1, seed=0, **options)
    data = benchmark.train_stream[0].dataset.image_data
    return data.images[data.rows].clone(), data


def entry(folder):
    (path,) = folder.iterdir()
    return path


def test_second_load_reads_the_same_from_the_cache(class_folders, cache_folder, decoded):
    first, data = pixels(class_folders)
    again, cached = pixels(class_folders)
    assert decoded == ["split_cifar100"]
    assert torch.equal(first, again)
    assert torch.equal(data.mean, cached.mean)
    with safe_open(entry(cache_folder), "pt") as file:
        assert sorted(file.keys()) == ["images", "labels", "mean", "std"]
        assert file.get_tensor("images").shape == (40, 3, 8, 8)
        assert json.loads(file.metadata()["class_names"]) == ["ant", "bee", "cat", "dog", "elk"]
    exact = first.double()
    torch.testing.assert_close(cached.mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(cached.std.double(), exact.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_images_are_memory_mapped(class_folders, cache_folder):
    _, data = pixels(class_folders)
    path, address = str(entry(cache_folder)), data.images.data_ptr()
    with open("/proc/self/maps", encoding="utf-8") as file:
        ranges = [line.split()[0].split("-") for line in file if line.rstrip().endswith(path)]
    assert any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


def test_rebuilt_when_a_source_file_changes(class_folders, cache_folder, decoded):
    before, _ = pixels(class_folders)
    file = class_folders / "train" / "ant" / "0.png"
    (class_folders / "train" / "ant" / "1.png").replace(file)
    after, _ = pixels(class_folders)
    assert len(after) == len(before) - 1
    os.utime(file, ns=(1, 1))
    pixels(class_folders)
    assert len(decoded) == 3
    assert len(list(cache_folder.iterdir())) == 1


def test_options_that_change_images_have_their_own_entry(class_folders, cache_folder, decoded):
    pixels(class_folders)
    pixels(class_folders, image_size=4)
    pixels(class_folders)
    assert len(decoded) == 2
    assert len(list(cache_folder.iterdir())) == 2


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _empty(path):
    path.write_bytes(b"")


def _other_header(path):
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 40) + content[8:])


def _garbage(path):
    path.write_bytes(os.urandom(500))


def _wrong_sizes(path):
    """A well-formed file whose labels name classes that do not exist."""
    content = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    content[start : start + 8] = struct.pack("<q", 99)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [_truncate, _empty, _other_header, _garbage, _wrong_sizes])
def test_damage_is_named_and_mended(class_folders, cache_folder, damage, caplog, decoded):
    before, _ = pixels(class_folders)
    path = entry(cache_folder)
    damage(path)
    with caplog.at_level(logging.WARNING):
        after, _ = pixels(class_folders)
    assert torch.equal(before, after)
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    pixels(class_folders)
    assert not caplog.records
    assert len(decoded) == 2


def test_a_cache_that_cannot_be_written_is_done_without(class_folders, cache_folder, caplog):
    expected, _ = pixels(class_folders)
    entry(cache_folder).unlink()
    cache_folder.rmdir()
    cache_folder.write_text("in the way")
    images, _ = pixels(class_folders)
    assert torch.equal(images, expected)
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_full_disk_is_done_without(class_folders, cache_folder, caplog, monkeypatch, moment):
    if moment == "before":
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: cache.shutil._ntuple_diskusage(9, 9, 0))
    else:

        def fail(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(cache.os, "fsync", fail)
    images, data = pixels(class_folders)
    assert len(images) == 30
    assert not list(cache_folder.iterdir())
    assert "cannot be written" in caplog.text
    assert data.std.min() > 1


def test_a_failed_build_leaves_nothing(class_folders, cache_folder):
    (class_folders / "test" / "elk" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"elk/1\.png"):
        pixels(class_folders)
    assert not list(cache_folder.iterdir())


def test_leavings_of_killed_builds_are_removed(class_folders, cache_folder):
    pixels(class_folders)
    path = entry(cache_folder)
    old, young = (path.with_name(f"{path.name}.{number}.tmp") for number in (1, 2))
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (0, 0))
    path.unlink()
    pixels(class_folders)
    assert sorted(cache_folder.iterdir()) == [path, young]


def test_more_images_than_memory_is_refused(monkeypatch, class_folders, cache_folder):
    cache_folder.write_text("in the way")
    monkeypatch.setattr(store.os, "sysconf", lambda _: 10)
    with pytest.raises(InputError, match="set LIFELONG_ENS_CACHE"):
        pixels(class_folders)


def test_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LIFELONG_ENS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "lifelong_ens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "lifelong_ens"
