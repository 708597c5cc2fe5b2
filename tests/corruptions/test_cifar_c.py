from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lifelong_ens.corruptions.cifar_c import read_cifar_c
from lifelong_ens.errors import InputError


def write(path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> np.memmap:
    """A file of zeros; a sparse one where the disk has such."""
    return np.lib.format.open_memmap(path, "w+", dtype, shape)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fog = write(tmp_path / "fog.npy", (50_000, 32, 32, 3))
    fog[20_000, 1, 2] = (7, 8, 9)
    fog[29_999, 31, 31, 2] = 5
    labels = write(tmp_path / "labels.npy", (50_000,))
    labels[:] = np.tile(np.arange(10_000) % 100, 5)
    return tmp_path


def test_the_part_of_one_severity(folder: Path) -> None:
    images, labels = read_cifar_c(folder, "fog", 3)
    assert images.shape == (10_000, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    assert images[0, :, 1, 2].tolist() == [7, 8, 9]
    assert images[9_999, 2, 31, 31] == 5
    assert images.long().sum() == 29
    assert torch.equal(labels, torch.arange(10_000) % 100)
    images += 1  # a copy: the file stays
    assert read_cifar_c(str(folder), "fog", 3)[0].long().sum() == 29


def test_names_and_severities_that_do_not_exist(folder: Path) -> None:
    with pytest.raises(InputError, match="did you mean fog"):
        read_cifar_c(folder, "fogg", 1)
    with pytest.raises(InputError, match="1 to 5"):
        read_cifar_c(folder, "fog", 0)


def spoil(kind: str, folder: Path) -> None:
    path = folder / "fog.npy"
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        with path.open("r+b") as file:
            file.truncate(1000)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "shape":
        write(path, (10_000, 32, 32, 3))
    elif kind == "type":
        write(path, (50_000, 32, 32, 3), np.int8)
    elif kind == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "text":
        path.write_text("not found")
    elif kind == "archive":
        with path.open("wb") as file:
            np.savez(file, a=np.zeros(3))


KINDS = ["missing", "truncated", "empty", "shape", "type", "pickle", "text", "archive"]


@pytest.mark.parametrize("kind", KINDS)
def test_spoiled_files_are_named_in_one_line(folder: Path, kind: str) -> None:
    spoil(kind, folder)
    with pytest.raises(InputError, match=r"fog\.npy") as caught:
        read_cifar_c(folder, "fog", 1)
    assert "\n" not in str(caught.value)


def test_labels_are_checked_too(folder: Path) -> None:
    write(folder / "labels.npy", (10_000,))
    with pytest.raises(InputError, match=r"labels\.npy.*50000"):
        read_cifar_c(folder, "fog", 1)
    write(folder / "labels.npy", (50_000,), np.float32)
    with pytest.raises(InputError, match=r"labels\.npy.*integers"):
        read_cifar_c(folder, "fog", 1)
