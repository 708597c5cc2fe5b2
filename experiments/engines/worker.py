"""What happens in a worker, whatever engine started it."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import cloudpickle
import torch
from tqdm import tqdm

from experiments.engines import Parcel
from lifelong_ens.errors import InputError

PACKAGES = ("lifelong-ens", "torch", "avalanche-lib", "numpy")
# seconds between two looks at whether the process that started this one is there
LOOK = 1.0


class UnknownParcelError(Exception):
    """A function was to be called again that this worker, a new one, has not been sent."""


# the function that was called last, by its token
_opened: dict[str, Callable[[Any], Any]] = {}


@dataclass(frozen=True)
class Driver:
    """What a worker has to know of the process that it works for.

    Attributes:
        threads: That torch may use in the worker.
        folder: That relative paths are meant from.
        versions: Of its packages.
    """

    threads: int
    folder: str
    versions: Mapping[str, str]

    @classmethod
    def here(cls, threads: int) -> Driver:
        """This process."""
        return cls(threads, os.getcwd(), versions_here())


def call(parcel: Parcel, item: bytes, driver: Driver) -> Any:
    """Call a function that was sent on an item that was sent.

    Args:
        parcel: The function; the last one is kept open, so that its data need not be sent again.
        item: Its argument.
        driver: Who sends it.

    Raises:
        InputError: Packages here are of other versions.
    """
    check_versions(driver.versions)
    torch.set_num_threads(driver.threads)
    with contextlib.suppress(OSError):  # a machine that does not have it has other paths, too
        os.chdir(driver.folder)
    if parcel.token not in _opened:
        if not parcel.data:
            raise UnknownParcelError
        _opened.clear()  # before the next is opened: it may hold all images of a stream
        _opened[parcel.token] = cloudpickle.loads(parcel.data)
    return _opened[parcel.token](cloudpickle.loads(item))


@functools.cache  # reading the metadata of packages takes longer than handing an item over
def versions_here() -> dict[str, str]:
    """Of Python and of what the numbers of a run depend on; a build's label, as in ``2.6.0+cu124``, is left out."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def check_versions(expected: Mapping[str, str]) -> None:
    """Refuse to run what would not be what it is elsewhere.

    Raises:
        InputError: Names what differs.
    """
    here = versions_here()
    differs = [
        f"{name} {here.get(name)} (driver: {value})"
        for name, value in expected.items()
        if here.get(name) != value
    ]
    if differs:
        raise InputError(
            f"the worker on {socket.gethostname()} has {', '.join(differs)}; install the same versions on every node."
        )


def begin(parent: int) -> None:
    """At the start of a worker of this machine: its parent hears the terminal, and it ends when that does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # by default it makes a lock for several processes, which outlives a worker that is ended
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)


def _version(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "not installed"
