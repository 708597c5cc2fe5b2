"""Decoded images on disk: a safetensors file per source, memory-mapped, rebuilt when the source changes."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lifelong_ens.errors import InputError
from lifelong_ens.store import cache_folder
from streams.store import ChannelStatistics, ImageStore, Plan, decode, from_reader, in_memory, train_part

VERSION = 1
_STALE_SECONDS = 3600.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Storage:
    """Where decoded images stay, checked as soon as it is given.

    Attributes:
        kind: ``cache`` keeps them on disk, ``files`` keeps none.
        workers: Threads that decode; 0 to decode in the caller's, and at most 1 where files are small.
        cache_gb: Refuse to keep more than so many GB of them; ``None`` for as many as fit.
    """

    kind: Literal["cache", "files"] = "cache"
    workers: int = 4
    cache_gb: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("cache", "files"):
            raise InputError(f"storage is {self.kind}; expected cache or files")
        if self.workers < 0:
            raise InputError(f"workers is {self.workers}; expected 0 or more threads")
        if self.cache_gb is not None and not self.cache_gb >= 0:
            raise InputError(f"cache_gb is {self.cache_gb}; expected 0 or more")

    def require_room(self, plan: Plan, name: str) -> None:
        """Refuse more decoded images than are allowed."""
        if self.cache_gb is not None and plan.images_bytes > self.cache_gb * 1e9:
            raise InputError(
                f"{name}: {len(plan.labels)} decoded images need {plan.images_bytes / 1e9:.1f} GB, more than "
                f"cache_gb, {self.cache_gb:g}; raise it, pass a smaller image_size or limit, or storage=files, "
                "which keeps none"
            )


@dataclass(frozen=True, eq=False, repr=False)
class Source:
    """Image files that can be decoded.

    Attributes:
        kind: How the files are read.
        root: The folder that the user named, or the address of shards.
        files: Lists path relative to ``root``, bytes, version and what else is known of every file.
        plan: Reads what must be known before decoding.
        options: What else changes the decoded images, such as the image size.
    """

    kind: str
    root: str | Path
    files: Callable[[], Iterable[tuple[str | int, ...]]]
    plan: Callable[[], Plan]
    options: Mapping[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        """Names the cache's file: the same folder read in the same way has the same key, changed or not."""
        root = self.root.resolve() if isinstance(self.root, Path) else self.root
        return digest([self.kind, str(root), sorted(self.options.items())])[:16]

    def fingerprint(self) -> str:
        """Changes whenever a file or an option does."""
        return digest([VERSION, self.kind, sorted(self.options.items()), list(self.files())])


def digest(content: Any) -> str:
    """Hex digits that stand for a value that JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load(source: Source, storage: Storage | None = None) -> ImageStore:
    """The images of a source: mapped from the cache, decoded first where that is missing or old, or left in files.

    Raises:
        InputError: An image cannot be decoded; the decoded images do not fit where they may stay.
    """
    storage = storage or Storage()
    if storage.kind == "files":
        return from_reader(source.plan())
    path = cache_folder() / f"{source.kind}-{source.key()}.safetensors"
    fingerprint = source.fingerprint()
    store = _read(path, fingerprint)
    if store is not None:
        return store
    plan = source.plan()
    storage.require_room(plan, source.kind)
    try:
        _write(path, plan, fingerprint, source.kind)
    except OSError as error:
        _log.warning("image cache %s cannot be written (%s); the decoded images stay in memory", path, error)
        return in_memory(plan, source.kind)
    return _read(path, fingerprint) or in_memory(plan, source.kind)


def _read(path: Path, fingerprint: str) -> ImageStore | None:
    """The store in a cache file; ``None`` where there is none that can be used."""
    try:
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                _log.info("image cache %s is outdated and will be rebuilt", path)
                return None
            tensors = {name: file.get_tensor(name) for name in ("images", "labels", "mean", "std")}
        store = ImageStore(
            **tensors,
            num_train=int(metadata["num_train"]),
            class_names=tuple(json.loads(metadata["class_names"])),
        )
        _check(store)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        _log.warning("image cache %s is damaged (%s) and will be rebuilt", path, error)
        return None
    return store


def _check(store: ImageStore) -> None:
    """Refuse tensors that do not fit together."""
    channels = store.images.shape[1] if len(store.images.shape) == 4 else -1
    fits = (
        isinstance(store.images, Tensor)
        and store.images.dtype == torch.uint8
        and store.labels.dtype == torch.int64
        and store.labels.shape == store.images.shape[:1]
        and store.mean.shape == store.std.shape == (channels,)
        and bool(store.mean.isfinite().all() and (store.std > 0).all())
        and 0 < store.num_train <= len(store.labels)
        and 0 <= int(store.labels.min()) <= int(store.labels.max()) < len(store.class_names)
    )
    if not fits:
        raise ValueError("its parts do not fit together")


def _write(path: Path, plan: Plan, fingerprint: str, name: str) -> None:
    """Decode a plan into a cache file, block by block, so that memory holds one block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    if plan.images_bytes > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, f"{plan.images_bytes / 1e9:.1f} GB do not fit on the disk")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            _write_content(file, plan, fingerprint, name)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _write_content(file: BinaryIO, plan: Plan, fingerprint: str, name: str) -> None:
    channels = plan.image_shape[0]
    # the images come last: what stands before them keeps its alignment whatever their size
    sizes = [
        ("labels", "I64", [len(plan.labels)], 8 * len(plan.labels)),
        ("mean", "F32", [channels], 4 * channels),
        ("std", "F32", [channels], 4 * channels),
        ("images", "U8", [len(plan.labels), *plan.image_shape], plan.images_bytes),
    ]
    metadata = {
        "format": "lifelong_ens images",
        "fingerprint": fingerprint,
        "num_train": str(plan.num_train),
        "class_names": json.dumps(plan.class_names),
    }
    _write_header(file, sizes, metadata)
    file.write(np.ascontiguousarray(plan.labels, dtype="<i8").tobytes())
    at_statistics = file.tell()
    file.write(bytes(8 * channels))
    statistics = ChannelStatistics(channels)
    for first, block in decode(plan, name):
        file.write(np.ascontiguousarray(block).data)
        statistics.update(train_part(plan, first, block))
    file.seek(at_statistics)
    for values in statistics.result():
        file.write(values.astype("<f4").tobytes())


def _write_header(
    file: BinaryIO, sizes: list[tuple[str, str, list[int], int]], metadata: dict[str, str]
) -> None:
    """The safetensors header: its length in 8 bytes, then JSON padded so that the data is aligned."""
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, dtype, shape, num_bytes in sizes:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + num_bytes]}
        start += num_bytes
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    file.write(struct.pack("<Q", len(content)) + content)


def _remove_stale(path: Path) -> None:
    """Delete what killed processes left; a file still being written is younger."""
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()
        except FileNotFoundError:
            continue


def _sync_folder(folder: Path) -> None:
    """Make the renaming last over a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
