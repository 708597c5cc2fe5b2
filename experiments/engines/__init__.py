"""Where the cells of a grid run: in processes of this machine, or as tasks of a Ray cluster."""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import cloudpickle
import torch

from experiments.options import whole
from lifelong_ens.errors import InputError, nearest

# how often an item is tried whose worker dies
TRIES = 3
NAMES = ("local", "ray")
OPTIONS = ("engine", "jobs", "ray_address", "resources")
# what --resources may say; any other name is a resource that nodes of a Ray cluster were started with
CPUS, GPUS, MEMORY = "cpus", "gpus", "memory"


class LostWorkerError(InputError):
    """The process that ran an item died, again and again."""


@dataclass(frozen=True)
class Parcel:
    """A function as bytes, and what tells it from others."""

    token: str
    data: bytes


class Engine(ABC):
    """Calls functions in other processes; to be entered before, and left after.

    Whoever enters one that is entered finds its workers at work, which end when the first leaves: several comparisons
    inside one ``with`` share them.

    A worker that dies costs only what it was doing: that is tried again, ``TRIES`` times in all.

    Attributes:
        threads: Of torch in each worker. Numbers are the same to the bit wherever as many threads make them.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._entered = 0
        self._packed: tuple[Callable[..., Any], Parcel] | None = None

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many items run at once."""

    @abstractmethod
    def submit(self, function: Callable[[Any], Any], item: Any, label: str) -> Future[Any]:
        """Call ``function(item)`` when a worker is free.

        Its future raises what the function raises, or ``LostWorkerError``. A worker keeps the last function that it
        was given, with whatever that keeps in its attributes.

        Args:
            function: What cloudpickle can send: closures and functions of scripts and notebooks can be sent, too.
            item: Its argument.
            label: For people.
        """

    def __enter__(self) -> Self:
        if not self._entered:
            self._start()
        self._entered += 1
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._entered -= 1
        if not self._entered:
            self._end(at_once=kind is not None)

    @abstractmethod
    def _start(self) -> None:
        """Get ready for the first item."""

    @abstractmethod
    def _end(self, at_once: bool) -> None:
        """End all workers, with what they are doing if there is anything left."""

    def threads_here(self) -> AbstractContextManager[None]:
        """Give torch in this process as many threads as in a worker."""
        return torch_threads(self.threads)

    def sender(self) -> Callable[[Any], object] | None:
        """What workers that do not see the driver's folder can call to be heard; None where all see it."""
        return None

    def heard(self) -> Iterator[Any]:
        """What was sent since the last call."""
        return iter(())

    def packed(self, function: Callable[[Any], Any]) -> Parcel:
        """A function to be sent, made bytes of once."""
        if self._packed is None or self._packed[0] is not function:
            data = dumped(function)
            self._packed = function, Parcel(hashlib.sha256(data).hexdigest(), data)
        return self._packed[1]


def make_engine(given: Mapping[str, Any]) -> Engine | None:
    """The engine that ``--engine``, ``--jobs``, ``--ray_address`` and ``--resources`` ask for.

    Args:
        given: These options by name, None where not given.

    Returns:
        None where nothing was asked for: then all runs in this process, one after the other.

    Raises:
        InputError: They cannot be used, or Ray is not installed.
    """
    name, jobs = given.get("engine"), given.get("jobs")
    address, resources = given.get("ray_address"), given.get("resources")
    if name is None and (jobs, address, resources) == (None, None, None):
        return None
    name = name or ("local" if address is None else "ray")
    if name not in NAMES:
        raise InputError(f"--engine {name}: {nearest(str(name), NAMES)}.")
    wanted = _resources(resources)
    if name == "ray":
        if jobs is not None:
            raise InputError(
                "--jobs is of --engine local; a Ray cluster runs as many at once as --resources allow."
            )
        try:
            from experiments.engines.ray import Ray
        except ModuleNotFoundError as error:
            raise InputError("--engine ray needs Ray: pip install 'lifelong-ens[ray]'.") from error

        return Ray(None if address is None else str(address), wanted)
    if address is not None:
        raise InputError("--ray_address is of --engine ray.")
    other = sorted(set(wanted) - {CPUS})
    if other:
        raise InputError(
            f"--resources {other[0]} is of --engine ray; local takes cpus, threads for each process."
        )
    from experiments.engines.local import Local

    return Local(None if jobs in (None, "auto") else whole("jobs", jobs), max(int(wanted.get(CPUS, 1)), 1))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch computes in so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dumped(value: Any) -> bytes:
    """What is sent to a worker.

    Raises:
        InputError: It cannot be sent.
    """
    try:
        return cloudpickle.dumps(value)
    except Exception as error:
        raise InputError(
            f"what is to be run cannot be sent to workers ({error}); give builders, functions that make a stream or a "
            "strategy, in place of what they make."
        ) from error


def cores() -> int:
    """Of this machine, as many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resources(given: Any) -> dict[str, float]:
    """``cpus=2,gpus=0.25`` as numbers by name."""
    if not isinstance(given, Mapping):
        given = dict(_pair(part) for part in str(given or "").split(",") if part.strip())
    return {str(name): _amount(name, value) for name, value in given.items()}


def _amount(name: str, value: Any) -> float:
    try:
        amount = float(value)
    except (TypeError, ValueError):
        amount = 0.0
    if not 0 < amount < math.inf:
        raise InputError(f"--resources {name}={value}: expected a number above 0.")
    return amount


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InputError(f"--resources {text}: expected NAME=AMOUNT, such as cpus=2,gpus=0.25.")
    return name.strip(), value
