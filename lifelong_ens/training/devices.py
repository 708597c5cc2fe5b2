"""What the processes of one run, each with a device of its own, tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lifelong_ens.errors import InputError

T = TypeVar("T")


class LostDeviceError(InputError):
    """Another process of this run does not answer any more."""


@dataclass(frozen=True)
class Devices:
    """The devices of a run, as one of its processes sees them; alone, everything here does nothing.

    All processes build the same networks from the same seeds and take the same steps: what they compute apart, each
    from rows of its own, is summed before anything is done with it. So every method here is called by all of them, in
    the same order.

    Attributes:
        rank: Which of the processes this is; the first, 0, writes and speaks for all.
        count: How many there are.
        device: This process's.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same to the bit in each; in place."""
        if self.count > 1:
            with _answering():
                dist.all_reduce(tensor)
        return tensor

    def each(self, tensor: Tensor) -> Tensor:
        """What every process has, ``(count, *shape)``."""
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        with _answering():
            dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def same(self, value: T) -> T:
        """What the first process has."""
        if self.count == 1:
            return value
        values = [value if self.first else None]
        with _answering():
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]  # pyright: ignore[reportReturnType]

    def first_alone(self, make: Callable[[], T]) -> T:
        """What ``make`` returns, called by the first process before the others: it may leave files for them."""
        if self.first:
            made = make()
            self.same(True)
            return made
        self.same(True)
        return make()

    def check_alike(self, digest: str, who: str) -> None:
        """See that all processes have learnt the same.

        Args:
            digest: Of everything learnt.
            who: The strategy.

        Raises:
            InputError: They have not; raised in all of them.
        """
        if self.count == 1:
            return
        agree = torch.tensor(int(self.same(digest) == digest))
        if int(self.total(agree)) < self.count:
            raise InputError(
                f"{who} does not run on several devices: its processes have learnt different numbers, so that what it "
                "does hangs on which rows a process has; run it on one."
            )

    def interleaved(self, mine: list[T]) -> list[T]:
        """What all processes made of the items that ``dealt`` gave them, in the order of the items."""
        if self.count == 1:
            return mine
        parts: list[list[T]] = [[] for _ in range(self.count)]
        with _answering():
            dist.all_gather_object(parts, mine)
        items = sum(map(len, parts))
        return [parts[index % self.count][index // self.count] for index in range(items)]

    def dealt(self, items: Iterable[T]) -> Iterator[T]:
        """Those of the items that are this process's, dealt in turns."""
        return islice(items, self.rank, None, self.count)

    def own(self, rows: int) -> slice:
        """Which of so many rows this process computes: all of them where there are fewer than processes."""
        return slice(self.rank, None, self.count) if rows >= self.count else slice(None)

    def computed(self, rows: int) -> tuple[int, int]:
        """How many rows are computed here, and by all processes together, where so many are shared."""
        return len(range(rows)[self.own(rows)]), rows if rows >= self.count else rows * self.count


ALONE = Devices(0, 1, torch.device("cpu"))


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch has no type of its own for it
        raise LostDeviceError(
            "the processes of this run do not hear of each other any more; the same command goes on after what is "
            f"finished ({str(error).splitlines()[0][:200]})"
        ) from error
