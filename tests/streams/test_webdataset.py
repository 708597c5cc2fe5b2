"""Streams from WebDataset shards."""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from PIL import Image

from experiments.cli import main
from lifelong_ens.errors import InputError
from streams import folders, image_folder, image_shards, shards

CLASSES = ["ant", "bee", "cat", "dog"]


@pytest.fixture
def photos(tmp_path):
    """Class folders of JPEGs and PNGs of mixed sizes: 4 classes of 9 training and 3 test images."""
    root = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for part, count in (("train", 9), ("test", 3)):
        for number in range(4 * count):
            ending = ".png" if number % 5 == 0 else ".jpg"
            path = root / part / CLASSES[number % 4] / f"{number:06}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = rng.integers(20, 60, 2)
            Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)
    return root


def write_tar(path, members):
    """A tar file of (name, content); returns its bytes where there is no path."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(buffer.getvalue())
    return buffer.getvalue()


def samples(folder, label=str.encode, ending="cls", seed=None):
    """What shards hold of class folders: sample after sample, in a random order if a seed is given."""
    paths = sorted(folder.glob("*/*"), key=lambda path: path.name)
    if seed is not None:
        paths = [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))]
    return [
        [(f"{path.stem}.{ending}", label(path.parent.name)), (path.name, path.read_bytes())] for path in paths
    ]


def pack(root, out, *, per_shard=7, seed=3, **options):
    """Shards ``out``/train-000.tar and so on of a folder with train/ and test/."""
    for part in ("train", "test"):
        found = samples(root / part, seed=seed, **options)
        for number, first in enumerate(range(0, len(found), per_shard)):
            members = [member for sample in found[first : first + per_shard] for member in sample]
            write_tar(out / f"{part}-{number:03}.tar", members)
    return out


@pytest.fixture
def packed(photos, tmp_path):
    return pack(photos, tmp_path / "shards")


def build(out, **options):
    given = {"train": f"{out}/train-*.tar", "test": f"{out}/test-*.tar", "num_tasks": 2, "image_size": 16}
    return image_shards(**(given | options))


def content(benchmark):
    """Everything of a stream: bytes, labels, means and names."""
    found = []
    for experiences in benchmark.streams.values():
        for data in (one.dataset.image_data for one in experiences):
            found += [data.images.index_select(0, data.rows), data.labels, data.mean, data.std]
    return found, benchmark.classes, benchmark.class_names


def equal(left, right):
    return left[1:] == right[1:] and all(torch.equal(a, b) for a, b in zip(left[0], right[0], strict=True))


@pytest.mark.parametrize("storage", ["files", "cache"])
@pytest.mark.parametrize("options", [{}, {"limit": 4, "seed": 5}])
def test_shards_are_the_stream_of_the_class_folders(photos, packed, storage, options):
    options = options | {"validation": 0.3, "storage": storage, "workers": 2}
    wanted = content(image_folder(root=photos, num_tasks=2, image_size=16, **options))
    assert equal(content(build(packed, **options)), wanted)


def test_without_test_shards_the_same_images_are_held_out(photos, packed):
    wanted = content(image_folder(root=photos / "train", num_tasks=2, image_size=16, test_fraction=0.3))
    assert equal(content(build(packed, test=None, test_fraction=0.3)), wanted)


def test_a_run_learns_to_the_bit_what_it_learns_from_class_folders(photos, packed, tmp_path):
    options = ["--num_tasks", "2", "--image_size", "12", "--storage", "files", "--workers", "2"]
    options += ["--network", "mlp", "--strategies", "finetune", "--epochs", "2", "--augment", "crop_flip"]
    records = []
    for out, where in {
        "folders": ["image_folder", "--root", str(photos)],
        "shards": ["image_shards", "--train", f"{packed}/train-*.tar", "--test", f"{packed}/test-*.tar"],
    }.items():
        command = ["compare", "--stream", *where, *options, "--device", "cpu", "--out", str(tmp_path / out)]
        assert main(command) == 0
        records.append(json.loads(next((tmp_path / out / "records").glob("*.json")).read_text()))
    for field in ("state_sha256", "accuracy"):
        assert records[0][field] == records[1][field]


@pytest.fixture
def memory():
    """Shards in a store that is no disk."""
    MemoryFileSystem.store.clear()
    yield "memory://bucket"
    MemoryFileSystem.store.clear()


def upload(folder, store):
    for path in sorted(folder.iterdir()):
        fsspec.filesystem("memory").pipe(f"{store}/{path.name}", path.read_bytes())


def test_a_store_gives_what_a_disk_gives(packed, memory, monkeypatch):
    upload(packed, memory)
    ranges = []
    read = MemoryFileSystem.cat_file

    def noted(self, path, start=None, end=None, **options):
        ranges.append((path, start))
        return read(self, path, start, end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", noted)
    options = {"storage": "files", "workers": 0}
    wanted = content(build(packed, **options))
    one = build(memory, **options)
    assert equal(content(one), wanted)
    data = one.train_stream[0].dataset.image_data
    ranges.clear()
    data.images.index_select(0, data.rows[torch.tensor([3, 0, 5, 0, 1])])
    assert ranges == sorted(ranges)
    assert len(ranges) == 5
    # a disk and a store in one stream
    assert equal(content(build(memory, test=f"{packed}/test-00[01].tar", **options)), wanted)


@pytest.mark.parametrize(
    "pattern", ["train-{000..005}.tar", "{train-00,train-00}{0..5}.tar", "train-00*.tar"]
)
def test_patterns(photos, packed, pattern, monkeypatch):
    assert len(list(packed.glob("train-*"))) == 6
    monkeypatch.chdir(packed)
    assert equal(content(build(packed, train=pattern)), content(build(packed)))


def test_class_numbers_and_their_names(photos, packed, tmp_path):
    numbers = {"ant": 0, "bee": 2, "cat": 10, "dog": 11}
    out = pack(
        photos, tmp_path / "numbered", ending="json", label=lambda c: json.dumps({"y": numbers[c]}).encode()
    )
    with pytest.raises(InputError, match=r"numbered up to 11 but no image has class 1; .*class_names"):
        build(out, label="json.y")
    lines = [f"name {number}" for number in range(12)]
    for name, number in numbers.items():
        lines[number] = name
    (tmp_path / "names.txt").write_text("\n".join(lines))
    named = {"label": "json.y", "class_names": tmp_path / "names.txt"}
    assert equal(content(build(out, **named)), content(build(packed)))
    (tmp_path / "names.txt").write_text("\n".join(lines[:11]))
    with pytest.raises(
        InputError, match="class 11 has no line in class_names, whose lines are those of 0 to 10"
    ):
        build(out, **named)
    with pytest.raises(InputError, match="class ant has no line"):
        build(packed, class_names=tmp_path / "names.txt")
    (tmp_path / "twice.txt").write_text("crane\nkite\ncrane")
    with pytest.raises(InputError, match=r"has 'crane' twice"):
        build(out, label="json.y", class_names=tmp_path / "twice.txt")
    with pytest.raises(InputError, match=r"class_names .*absent cannot be read"):
        build(packed, class_names=tmp_path / "absent")


def test_the_index_is_read_once_and_again_where_it_or_the_shard_changed(
    packed, cache_folder, monkeypatch, caplog
):
    read = []
    original = shards._read_index
    monkeypatch.setattr(
        shards, "_read_index", lambda f, name, label: read.append(name) or original(f, name, label)
    )
    options = {"storage": "files"}
    wanted = content(build(packed, **options))
    assert len(read) == 8
    build(packed, **options)
    assert len(read) == 8
    for index in (cache_folder / "shards").iterdir():
        index.write_bytes(index.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        assert equal(content(build(packed, **options)), wanted)
    assert len(read) == 16
    assert "made anew" in caplog.text
    shutil.copy(packed / "train-001.tar", packed / "train-000.tar")
    (packed / "train-001.tar").unlink()
    assert len(build(packed, **options).train_stream) == 2
    assert len(read) == 17
    with pytest.raises(InputError, match="no class"):
        build(packed, label="json.y")


def test_names_as_tools_write_them(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (9, 9)).save(picture, "PNG")
    members = []
    for number in range(4):
        key = f"./some.folder/a long name {'x' * 120} {number}"
        members += [(f"{key}.seg.png", b"a mask"), (f"{key}.PNG", picture.getvalue())]
        members += [(f"{key}.cls", f"{number % 2}\n".encode()), (f"{key}.txt", b"a caption")]
    members += [("./some.folder/._0.png", b"of a Mac"), ("./README", b"")]
    write_tar(tmp_path / "x.tar", members)
    benchmark = image_shards(train=str(tmp_path / "x.tar"), num_tasks=1, test_fraction=0.5, image_size=8)
    assert benchmark.class_names == [["0", "1"]]
    assert [len(one.dataset) for one in (*benchmark.train_stream, *benchmark.test_stream)] == [2, 2]


def test_threads_wait_for_a_store_however_small_the_images(packed, memory):
    upload(packed, memory)
    for where, threads in ((packed, 1), (memory, 3)):
        store = build(where, storage="files", workers=3).train_stream[0].dataset.image_data.images
        assert store._workers == threads
    assert folders._THREADED_BYTES > 1000


IMAGE = b"never decoded"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("7.jpg", IMAGE)], "sample 7 has no class: 7.cls is missing"),
        ([("a/7.cls", b"1")], "sample a/7 has no image"),
        ([("7.jpg", IMAGE), ("7.cls", b" ")], "7.cls says no class (it is empty)"),
        ([("7.jpg", IMAGE), ("7.cls", b"\xff")], "7.cls says no class ("),
        ([("7.jpg", IMAGE), ("7.png", IMAGE)], "sample 7 has a second image, 7.png"),
        ([("7.cls", b"1"), ("7.cls", b"1")], "sample 7 has a second class, 7.cls"),
        ([("7.txt", b"")], "has no samples; expected members such as 7.jpg and 7.cls"),
        ([("7.jpg", IMAGE), ("7.json", b"{}")], "7.json says no class (no key y)"),
        ([("7.jpg", IMAGE), ("7.json", b"[3]")], "7.json says no class (no key y)"),
        ([("7.jpg", IMAGE), ("7.json", b'{"y": 1.5}')], "7.json says no class (y is 1.5)"),
        ([("7.jpg", IMAGE), ("7.json", b'{"y":')], "7.json says no class ("),
    ],
)
def test_bad_samples_are_one_line(tmp_path, members, message):
    write_tar(tmp_path / "bad.tar", members)
    label = "json.y" if any(name.endswith("json") for name, _ in members) else "cls"
    with pytest.raises(InputError) as caught:
        image_shards(train=str(tmp_path / "bad.tar"), label=label)
    assert message in str(caught.value)
    assert "bad.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [100, 700, 512 * 3, 512 * 3 + 5, -10_000, -1])
def test_truncated_shards_are_named(packed, kept):
    path = packed / "train-002.tar"
    whole = path.read_bytes()
    last = whole.rstrip(b"\0")
    path.write_bytes(
        whole[:kept] if kept > 0 else last[:kept] if kept < -1 else last + bytes(-len(last) % 512)
    )
    with pytest.raises(InputError, match=r"train-002\.tar is no whole tar file") as caught:
        build(packed)
    assert "\n" not in str(caught.value)


def test_compressed_shards_and_what_is_no_tar_are_named(tmp_path):
    for mode in ("w:gz", "w:xz"):
        tarfile.open(tmp_path / "x.tar", mode).close()
        with pytest.raises(InputError, match=r"x\.tar is no whole tar file .*uncompressed"):
            image_shards(train=str(tmp_path / "x.tar"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "absent-*.tar"}, r"no shard matches .*absent-\*\.tar"),
        ({"train": "absent-{0..1}.tar"}, r"absent-0\.tar cannot be read"),
        ({"label": "json"}, r"expected json\.KEY"),
        (
            {"train": "far://bucket/x.tar"},
            "far://bucket/x.tar cannot be read: Install absent_far to read far; pip install",
        ),
        ({"train": "nowhere://bucket/x.tar"}, "Protocol not known: nowhere"),
        ({"train": "test-*.tar"}, r"test-000\.tar is in train and in test"),
        ({"num_tasks": 5}, "5 but there are 4 classes"),
    ],
)
def test_bad_options_are_one_line(packed, options, message, monkeypatch):
    known = {"class": "absent_far.FileSystem", "err": "Install absent_far to read far"}
    monkeypatch.setitem(known_implementations, "far", known)
    monkeypatch.chdir(packed)
    with pytest.raises(InputError, match=message) as caught:
        build(packed, **options)
    assert "\n" not in str(caught.value)


def test_damaged_images_and_shards_that_go_away_are_named(packed, photos, monkeypatch):
    monkeypatch.setattr("streams.store.STATISTICS_IMAGES", 1)
    benchmark = build(packed, storage="files")
    data = benchmark.test_stream[0].dataset.image_data
    path = packed / "test-001.tar"
    whole = path.read_bytes()
    name = whole[: whole.index(b"\0")].decode().split(".")[0]
    image = next(one for one in (photos / "test").glob(f"*/{name}.*")).read_bytes()
    path.write_bytes(whole.replace(image, bytes(len(image))))
    everything = torch.arange(36, 48)
    with pytest.raises(InputError, match=rf"test-001\.tar/{name}\.\w+ cannot be decoded"):
        data.images.index_select(0, everything)
    path.write_bytes(whole[:600])
    with pytest.raises(InputError, match=r"test-001\.tar cannot be read \(\d+ bytes came where"):
        data.images.index_select(0, everything)
    path.unlink()
    with pytest.raises(InputError, match=r"test-001\.tar cannot be read \(.*No such file"):
        data.images.index_select(0, everything)
