"""Images decoded from their files or shards when they are asked for, a few batches ahead, by threads."""

from __future__ import annotations

import math
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, repeat, starmap
from operator import itemgetter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lifelong_ens.errors import InputError

# what a thread decodes at a time: enough that handing it over costs nothing beside it
_PIECE = 8


class ReadImage(Protocol):
    """Decodes one image, uint8 ``(C, H, W)``: a file, or bytes from a shard, which ``path`` then only names."""

    def __call__(self, path: str, /, *, content: bytes | None) -> np.ndarray:
        """The image."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Members:
    """Where images lie in shards.

    Attributes:
        shards: Address of each shard, for fsspec.
        shard: Number of each image's shard, ``(n,)``.
        start: Where in the shard the image begins, ``(n,)``.
        end: Where it ends, ``(n,)``.
    """

    shards: list[str]
    shard: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def order(self, rows: np.ndarray) -> np.ndarray:
        """Positions in ``rows``, ``(k,)``, so that they are read shard by shard and forward in each."""
        return np.lexsort((self.start[rows], self.shard[rows]))

    def read(self, rows: np.ndarray) -> Iterator[bytes]:
        """The bytes of the images ``rows``, ``(k,)``, in this order.

        Raises:
            InputError: Names the first shard that cannot be read.
        """
        shards = [self.shards[number] for number in self.shard[rows].tolist()]
        spans = [*zip(shards, self.start[rows].tolist(), self.end[rows].tolist(), strict=True)]
        contents = _read_stores(spans) if any(map(is_remote, shards)) else starmap(_read_file, spans)
        for (shard, start, end), content in zip(spans, contents, strict=True):
            if isinstance(content, Exception):
                raise unreadable(shard, content)
            if len(content) != end - start:
                reason = f"{len(content)} bytes came where {end - start} were asked for: has it changed?"
                raise unreadable(shard, reason)
            yield content


def _read_file(path: str, start: int, end: int) -> bytes | OSError:
    """What stands between two bytes of a file, or why it cannot be read; fsspec's own way takes four times as long."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            return os.pread(handle, end - start, start)
        finally:
            os.close(handle)
    except OSError as error:
        return error


def _read_stores(spans: Iterable[tuple[str, int, int]]) -> Iterator[bytes | Exception]:
    """What stands between two bytes of an address each, or why it cannot be read; a store is asked for all at once."""
    from fsspec.core import url_to_fs

    # fsspec knows its file systems by process and thread: one that is kept could not cross a fork
    places = ((*url_to_fs(shard), start, end) for shard, start, end in spans)
    for system, group in groupby(places, key=itemgetter(0)):
        _, paths, starts, ends = map(list, zip(*group, strict=True))
        yield from system.cat_ranges(paths, starts, ends, on_error="return")


def is_remote(shard: str) -> bool:
    """Whether fsspec has to read a shard; others are files."""
    return "://" in shard


def unreadable(shard: str, reason: Exception | str) -> InputError:
    """The error for a shard that is there no more, was never, or is kept from the user."""
    if isinstance(reason, Exception):
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        reason = f"{type(reason).__name__}: {text}".splitlines()[0]
    return InputError(f"{shard} cannot be read ({reason}); restore it or the access to it, and run again")


class ImageFiles:
    """Image files read like the uint8 images ``(n, C, H, W)`` of ``ImageData``, of which memory holds a few batches.

    Pillow reads, decodes and resizes without the interpreter's lock, so that threads do what worker processes would,
    at less cost: nothing is started, copied or sent. They stay for as long as this does, over epochs and tasks.

    Args:
        paths: Of the images; their names where they lie in shards.
        read: Decodes one.
        image_shape: ``(C, H, W)`` of every one.
        workers: Threads that decode; 0 to decode where the images are asked for.
        members: Where the images lie in shards; ``None`` where each is a file.
    """

    def __init__(
        self,
        paths: Sequence[str],
        read: ReadImage,
        image_shape: tuple[int, int, int],
        workers: int,
        members: Members | None = None,
    ) -> None:
        # a million paths are 100 MB as bytes, and more than twice that as text
        self._paths = np.array([os.fsencode(path) for path in paths])
        self._read, self._workers, self._members = read, workers, members
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self.shape = len(paths), *image_shape

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """The images at ``index``, ``(k,)``, as of a tensor; ``dim`` is 0."""
        return next(self.read_ahead([index]))

    def read_ahead(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of each batch of rows, ``(k,)``; while one is used, at least the next is decoded.

        What is decoded and not yet given stays below two batches and what two pieces for each thread hold.

        Raises:
            InputError: Names the first image that cannot be decoded, in the order in which they are read: that of
                the rows, in shards that of the bytes.
        """
        pending: deque[tuple[Tensor, list[Future[None]]]] = deque()
        images = 0
        try:
            for rows in batches:
                pending.append(self._begin(rows))
                images += len(rows)
                while pending and images - len(pending[0][0]) >= 2 * self._workers * _PIECE:
                    images -= len(pending[0][0])
                    yield _finish(*pending.popleft())
            while pending:
                yield _finish(*pending.popleft())
        finally:
            for _, pieces in pending:
                for piece in pieces:
                    piece.cancel()

    def _begin(self, rows: Tensor) -> tuple[Tensor, list[Future[None]]]:
        """A batch that will hold these images when its pieces are done."""
        images = _pages(len(rows), *self.shape[1:])
        wanted, pixels = rows.numpy(), images.numpy()
        order = np.arange(len(rows)) if self._members is None else self._members.order(wanted)
        pieces = [order[start : start + _PIECE] for start in range(0, len(rows), _PIECE)]
        if self._workers == 0:
            for piece in pieces:
                self._decode(wanted, piece, pixels)
            return images, []
        return images, [self._threads().submit(self._decode, wanted, piece, pixels) for piece in pieces]

    def _decode(self, rows: np.ndarray, piece: np.ndarray, out: np.ndarray) -> None:
        """Fill in the images at the positions ``piece`` of a batch."""
        mine = rows[piece]
        contents = repeat(None) if self._members is None else self._members.read(mine)
        for position, path, content in zip(piece, self._paths[mine], contents, strict=False):
            out[position] = self._read(os.fsdecode(path), content=content)

    def _threads(self) -> ThreadPoolExecutor:
        # a process that is forked, such as a worker of a DataLoader, has no threads
        if self._pool is None or self._process != os.getpid():
            self._pool, self._process = ThreadPoolExecutor(self._workers, "decode"), os.getpid()
        return self._pool

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


def _pages(*shape: int) -> Tensor:
    """A uint8 tensor in pages of its own, which go back when it does.

    On the C library's heap batches leave holes: a process grew by 30 MB with every thousand images.
    """
    count = math.prod(shape)
    return torch.frombuffer(mmap.mmap(-1, max(count, 1)), dtype=torch.uint8)[:count].view(shape)


def _finish(images: Tensor, pieces: Iterable[Future[None]]) -> Tensor:
    for piece in pieces:
        piece.result()
    return images
