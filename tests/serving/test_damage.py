"""A thousand damaged task files: each refused in one line, nothing of it loaded, memory bounded."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from collections.abc import Callable

import pytest
import torch

from lifelong_ens.errors import DamagedFileError
from lifelong_ens.networks.task import Independent
from lifelong_ens.serving import ServedModel, TaskStore
from lifelong_ens.store import write_bytes, write_tensors

X = torch.linspace(-1, 1, 2 * 192).view(2, 3, 8, 8)


def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def flipped(data: bytes, draw: random.Random) -> bytes:
    # anywhere, so that header, metadata and numbers are all hit
    damaged = bytearray(data)
    for _ in range(draw.choice([1, 1, 4, 64])):
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def longer(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randrange(1, 1000))


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: dict, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def huge_header(data: bytes, draw: random.Random) -> bytes:
    return struct.pack("<Q", draw.choice([2**63, 2**40, 10**8 + 1, len(data) + 1])) + data[8:]


def huge_tensor(data: bytes, draw: random.Random) -> bytes:
    header, rest = header_of(data)
    name = draw.choice([key for key in header if key != "__metadata__"])
    size = draw.choice([2**40, 2**62, 2**20])
    header[name]["shape"] = [size]
    if draw.random() < 0.5:
        header[name]["data_offsets"] = [0, 4 * size]
    return with_header(header, rest)


def other_shape(data: bytes, draw: random.Random) -> bytes:
    header, rest = header_of(data)
    several = [key for key in header if key != "__metadata__" and len(header[key]["shape"]) > 1]
    tensor = header[draw.choice(several)]
    *first, one, two = tensor["shape"]
    tensor["shape"] = [*first, one * two]
    return with_header(header, rest)


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    truncated,
    flipped,
    longer,
    huge_header,
    huge_tensor,
    other_shape,
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"kind": Independent}], ids=["members", "network"])
def test_every_damaged_file_is_refused(kind, exported):
    _, folder = exported(**kind)
    path, draw = folder / "tasks/1.safetensors", random.Random(0)
    good, model = path.read_bytes(), ServedModel(folder)
    expected = model(X, "2")
    model(X, "1")
    rows = 0 if model._network is None else model._network.body.features[0].r.num_members
    tracemalloc.start()
    for number in range(504):
        damaged = DAMAGES[number % len(DAMAGES)](good, draw)
        assert damaged != good
        write_bytes(path, damaged)
        with pytest.raises(DamagedFileError) as caught:
            model(X, "1")
        line = str(caught.value)
        assert str(path) in line
        assert "\n" not in line
        assert len(line) < 600
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2**20
    assert torch.equal(model(X, "2"), expected)
    assert rows == (0 if model._network is None else model._network.body.features[0].r.num_members)
    write_bytes(path, good)
    model(X, "1")


def test_files_with_sound_hashes_that_do_not_fit(exported):
    _, folder = exported()
    store, model = TaskStore(folder), ServedModel(folder)
    good = store.read("1")
    header = {"kind": "members", "base": store.description.base, "labels": list(good.labels), "about": {}}
    path = folder / "tasks/1.safetensors"
    for name, tensor in good.tensors.items():
        for wrong in (tensor[..., :-1], tensor.unsqueeze(0), tensor.half(), torch.zeros(0)):
            write_tensors(path, {**good.tensors, name: wrong}, header)
            with pytest.raises(DamagedFileError, match=r"does not fit this model|labels for a head"):
                model(X, "1")
    write_tensors(path, good.tensors, {**header, "base": "0" * 64})
    with pytest.raises(DamagedFileError, match="another base"):
        model(X, "1")
    with open(path, "r+b") as file:
        file.truncate(10**10)  # nothing but a size, on most file systems
    model = ServedModel(folder)
    with pytest.raises(DamagedFileError, match="has 10000000000 bytes, where at most"):
        model(X, "1")
