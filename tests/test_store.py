from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lifelong_ens import store
from lifelong_ens.errors import DamagedFileError


def example() -> dict[str, Tensor]:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "weight": base.t(),
        "tied": base,
        "part": base[1:],
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 5),
        "half": torch.randn(4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def test_tensors_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    sha256 = store.write_tensors(
        path, example(), {"task": 3, "names": ("a", "é"), "loss": float("nan"), "by_task": {2: 0.1, 10: 1}}
    )
    assert same(store.read_tensors(path), example())
    assert same(store.read_tensors(path, sha256=sha256), example())
    assert store.read_metadata(path) == {
        "task": 3,
        "names": ["a", "é"],
        "loss": None,
        "by_task": {"2": 0.1, "10": 1},
    }
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"]


def test_same_content_same_file(tmp_path: Path) -> None:
    hashes = {store.write_tensors(tmp_path / f"{i}", example(), {"b": 1, "a": 2}) for i in range(20)}
    assert len(hashes) == 1
    assert len({(tmp_path / f"{i}").read_bytes() for i in range(20)}) == 1


def test_content_hash_sees_content_and_nothing_else() -> None:
    tensors = example()
    reference = store.tensors_sha256(tensors)
    assert store.tensors_sha256(dict(reversed(tensors.items()))) == reference
    assert store.tensors_sha256({**tensors, "weight": tensors["weight"].contiguous()}) == reference
    changed = [
        {**tensors, "scalar": torch.tensor(4)},
        {**tensors, "scalar": torch.tensor(3, dtype=torch.int32)},
        {**tensors, "empty": torch.zeros(5, 0)},
        {name + "_": tensor for name, tensor in tensors.items()},
    ]
    assert len({reference, *map(store.tensors_sha256, changed)}) == 5


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, share: float) -> None:
    tensors, text = tmp_path / "a.safetensors", tmp_path / "a.json"
    store.write_tensors(tensors, example(), {"task": 1})
    store.write_json(text, {"accuracy": [[0.5, None]], "name": "x"})
    for path, read in (
        (tensors, store.read_tensors),
        (tensors, store.read_metadata),
        (text, store.read_json),
    ):
        data = path.read_bytes()
        path.write_bytes(data[: min(int(share * len(data)), len(data) - 2)])
        with pytest.raises(DamagedFileError, match=path.name):
            read(path)
        path.write_bytes(data)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_no_flipped_byte_passes_as_other_content(tmp_path: Path, position: float, flip: int) -> None:
    path = tmp_path / "a.safetensors"
    sha256 = store.write_tensors(path, example(), {"task": 1})
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= flip
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"a\.safetensors"):
        store.read_tensors(path, sha256=sha256)
    try:
        tensors = store.read_tensors(path)
    except DamagedFileError:
        return
    assert same(tensors, example())  # only white space in the header may change unseen


def test_longer_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    store.write_tensors(path, example())
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DamagedFileError, match="safetensors file"):
        store.read_tensors(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(2)}, path)
    for read in (store.read_tensors, store.read_metadata):
        with pytest.raises(DamagedFileError, match="not written by lifelong_ens"):
            read(path)
    torch.save({"a": torch.ones(2)}, path)
    for read in (store.read_tensors, store.read_metadata, store.read_json):
        with pytest.raises(DamagedFileError, match="foreign"):
            read(path)


def test_json_round_trip_is_strict_and_nan_is_null(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"a": [1, 2.5, float("nan"), np.float64("nan")], "b": {"c": (None, "ü")}}
    sha256 = store.write_json(path, value)
    expected = {"a": [1, 2.5, None, None], "b": {"c": [None, "ü"]}}
    assert store.read_json(path) == store.read_json(path, sha256) == json.loads(path.read_text()) == expected
    with pytest.raises(ValueError, match="JSON compliant"):
        store.write_json(path, [float("inf")])
    with pytest.raises(DamagedFileError, match="sha256"):
        store.read_json(path, "0" * 64)
    assert store.read_json(path) == expected


@pytest.mark.parametrize(
    "data", [b'{"a": NaN}', b"{'a': 1}", b'{"a": "\xff"}', b"", b"[" * 100_000, b"{} {}"]
)
def test_what_is_not_json_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"a\.json.*delete it"):
        store.read_json(path)


def test_missing_files_stay_os_errors(tmp_path: Path) -> None:
    for read in (store.read_tensors, store.read_metadata, store.read_json):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")


@pytest.mark.parametrize(("step", "code"), [("fsync", errno.ENOSPC), ("replace", errno.EROFS)])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    path = tmp_path / "a.json"
    store.write_json(path, 1)

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match=r"No space|Read-only") as caught:
        store.write_json(path, 2)
    monkeypatch.undo()
    assert caught.value.errno == code
    assert store.read_json(path) == 1
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder_is_an_os_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            store.write_json(tmp_path / "a.json", 1)
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        store.write_tensors(tmp_path / "file" / "a.safetensors", example())


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    store.write_json(tmp_path / "a.json", 1)
    (tmp_path / "b.json").write_text("1")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode


def test_a_concurrent_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    states = [{"a": torch.full((5000 + 1000 * i,), float(i))} for i in range(2)]
    store.write_tensors(path, states[0])
    done = threading.Event()

    def write() -> None:
        for i in range(60):
            store.write_tensors(path, states[i % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set() or reads < 20:
        tensors = store.read_tensors(path)
        assert any(same(tensors, state) for state in states)
        reads += 1
    writer.join()
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_tensors_and_metadata_of_one_reading(tmp_path):
    path = tmp_path / "a.safetensors"
    store.write_tensors(path, example(), {"name": "a"})
    tensors, metadata = store.read_labelled(path)
    assert same(tensors, example())
    assert metadata == {"name": "a"} == store.read_metadata(path)
    size = path.stat().st_size
    store.read_labelled(path, max_bytes=size)
    with pytest.raises(DamagedFileError, match=f"has {size} bytes, where at most {size - 1} are expected"):
        store.read_labelled(path, max_bytes=size - 1)


def test_mapped_tensors_are_checked_and_outlive_their_file(tmp_path):
    path = tmp_path / "a.safetensors"
    store.write_tensors(path, example())
    mapped = store.map_tensors(path)
    store.write_tensors(path, {"other": torch.zeros(2)})
    assert same(mapped, example())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedFileError, match="was altered after it was written"):
        store.map_tensors(path)
    path.write_bytes(bytes(data[:-1]))
    with pytest.raises(DamagedFileError, match="not a complete safetensors file"):
        store.map_tensors(path)
