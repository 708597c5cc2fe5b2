"""Images decoded from their files when they are asked for, a few batches ahead, by threads."""

from __future__ import annotations

import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

# what a thread decodes at a time: enough that handing it over costs nothing beside it
_PIECE = 8


class ImageFiles:
    """Image files read like the uint8 images ``(n, C, H, W)`` of ``ImageData``, of which memory holds a few batches.

    Pillow reads, decodes and resizes without the interpreter's lock, so that threads do what worker processes would,
    at less cost: nothing is started, copied or sent. They stay for as long as this does, over epochs and tasks.

    Args:
        paths: Of the images.
        read: Decodes one, uint8 ``(C, H, W)``.
        image_shape: ``(C, H, W)`` of every one.
        workers: Threads that decode; 0 to decode where the images are asked for.
    """

    def __init__(
        self,
        paths: Sequence[str],
        read: Callable[[str], np.ndarray],
        image_shape: tuple[int, int, int],
        workers: int,
    ) -> None:
        # a million paths are 100 MB as bytes, and more than twice that as text
        self._paths = np.array([os.fsencode(path) for path in paths])
        self._read, self._workers = read, workers
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
            InputError: Names the first file in the order of the rows that cannot be decoded.
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
        paths, pixels = self._paths[rows.numpy()], images.numpy()
        if self._workers == 0:
            self._decode(paths, pixels)
            return images, []
        starts, submit = range(0, len(rows), _PIECE), self._threads().submit
        return images, [submit(self._decode, paths[i : i + _PIECE], pixels[i : i + _PIECE]) for i in starts]

    def _decode(self, paths: np.ndarray, out: np.ndarray) -> None:
        for number, path in enumerate(paths):
            out[number] = self._read(os.fsdecode(path))

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
