"""Tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import ray
import ray.exceptions
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from experiments.engines import CPUS, GPUS, MEMORY, TRIES, Engine, LostWorkerError, dumped
from experiments.engines.worker import Driver, call
from lifelong_ens.errors import InputError

log = logging.getLogger(__name__)

# seconds that an address has to answer, and the port where it names none
ANSWER, PORT = 10.0, 6379
# how a client of HTTP/2, and so of gRPC, begins, and the type of the frame that is answered, in its fourth byte
SETTINGS = b"\x04"
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + SETTINGS + b"\0\0\0\0\0"
# as Ray names what each node has
RAYS_NAMES = {CPUS: "CPU", GPUS: "GPU", MEMORY: "memory"}


class Ray(Engine):
    """Ray's tasks: one for each item, retried by Ray on another node when a worker or its node dies.

    Args:
        address: ``auto`` for the cluster that this machine is part of, or ``HOST[:PORT]`` of that cluster's head. If
            not given: the one that ``RAY_ADDRESS`` names, or one of this machine alone, for as long as it is needed.
        resources: Of a task: ``cpus`` (threads of torch, too; 1 if not given), ``gpus``, ``memory`` in bytes, or any
            resource that nodes were started with.
    """

    def __init__(self, address: str | None = None, resources: Mapping[str, float] | None = None) -> None:
        self.address, self.resources = address, {CPUS: 1.0, **(resources or {})}
        super().__init__(max(int(self.resources[CPUS]), 1))
        self._connected = False
        self._tasks: set[Any] = set()
        self._sent: tuple[str, Any] = "", None
        self._queue: Any = None

    @property
    def slots(self) -> int:
        """See ``Engine``."""
        return max(int(sum(_fit(node, self._wanted()) for node in _nodes())), 1)

    def submit(self, function: Callable[[Any], Any], item: Any, label: str) -> Future[Any]:
        """See ``Engine``."""
        parcel = self.packed(function)
        if self._sent[0] != parcel.token:
            self._sent = parcel.token, ray.put(parcel)
        other = {name: value for name, value in self.resources.items() if name not in RAYS_NAMES}
        task = ray.remote(call).options(
            name=label,
            num_cpus=self.resources[CPUS],
            num_gpus=self.resources.get(GPUS, 0),
            memory=self.resources.get(MEMORY),
            resources=other or None,
            max_retries=TRIES - 1,
        )
        answer = task.remote(self._sent[1], dumped(item), Driver.here(self.threads))
        self._tasks.add(answer)
        future: Future[Any] = Future()
        answer.future().add_done_callback(lambda done: self._settle(done, answer, future, label))
        return future

    def sender(self) -> Callable[[Any], object]:
        """See ``Engine``."""
        return self._queue.put_nowait

    def heard(self) -> Iterator[Any]:
        """See ``Engine``."""
        with contextlib.suppress(Exception):  # news is no reason to fail
            yield from self._queue.get_nowait_batch(self._queue.qsize())

    def _start(self) -> None:
        if not ray.is_initialized():
            _connect(self.address)
            self._connected = True
        self._tasks, self._sent = set(), ("", None)
        try:
            _check_resources(self._wanted())
            self._queue = _queue_here()
            log.info("on a Ray cluster, %d tasks at once", self.slots)
        except BaseException:
            self._end(at_once=True)
            raise

    def _end(self, at_once: bool) -> None:
        with contextlib.suppress(Exception):  # a cluster that has gone needs no tidying up
            for answer in self._tasks:
                ray.cancel(answer, force=True)
            if self._queue is not None:
                self._queue.shutdown(force=True)
        if self._connected:
            ray.shutdown()
            self._connected = False

    def _wanted(self) -> dict[str, float]:
        """The resources of a task, as Ray names them."""
        return {RAYS_NAMES.get(name, name): value for name, value in self.resources.items()}

    def _settle(self, done: Future[Any], answer: Any, future: Future[Any], label: str) -> None:
        """From Ray's future to ours."""
        self._tasks.discard(answer)
        error = done.exception()
        if error is None:
            future.set_result(done.result())
        else:
            future.set_exception(_ours(error, label))


def _queue_here() -> Any:
    """A queue that lives as long as the driver's node does."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


def _ours(error: BaseException, label: str) -> BaseException:
    """What a task raised, or that it was lost."""
    cause = getattr(error, "cause", None)
    if isinstance(error, ray.exceptions.RayTaskError):
        missing = isinstance(cause, ModuleNotFoundError) or "failed to import" in str(error)
        if missing:
            return InputError(
                f"a worker cannot import what it is to run ({_line(cause or error)}); install the same packages on "
                "every node."
            )
        return cause if isinstance(cause, BaseException) else error
    if isinstance(error, ray.exceptions.RayError):
        return LostWorkerError(f"{label}: its worker died {TRIES} times: {_line(error)}")
    return error


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _connect(address: str | None) -> None:
    """Join a cluster.

    Raises:
        InputError: There is none, or it is of another version.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = _reached(address)
    if address is None:
        quiet["include_dashboard"] = False
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise InputError(
            f"--ray_address {address or 'auto'}: no cluster answers ({_line(error)}); start one with `ray start "
            "--head`, or leave the option out."
        ) from error
    except (RuntimeError, ValueError) as error:
        raise InputError(f"cannot join the Ray cluster: {_line(error)}") from error


def _reached(address: str | None) -> str | None:
    """An address with its port at which something speaks as a cluster's head does.

    Raises:
        InputError: Nothing does, in ``ANSWER`` seconds; Ray itself would try for minutes.
    """
    if address in (None, "auto", "local"):
        return address
    host, _, port = address.partition(":")
    try:
        number = int(port or PORT)
        with socket.create_connection((host, number), timeout=ANSWER) as connection:
            connection.sendall(HELLO)
            if connection.recv(9)[3:4] != SETTINGS:
                raise OSError("it is no Ray cluster")
    except (OSError, ValueError) as error:
        raise InputError(
            f"--ray_address {address}: nothing answers there ({error}); give HOST:PORT of the cluster's head, "
            "on one of its nodes."
        ) from error
    return f"{host}:{number}"


def _nodes() -> list[dict[str, float]]:
    """What each node of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fit(node: Mapping[str, float], wanted: Mapping[str, float]) -> float:
    """How many tasks a node has room for."""
    return min(node.get(name, 0.0) // value for name, value in wanted.items())


def _check_resources(wanted: Mapping[str, float]) -> None:
    """Refuse what would wait for ever.

    Raises:
        InputError: Says what the nodes have.
    """
    nodes = _nodes()
    if not any(_fit(node, wanted) for node in nodes):
        asked = ", ".join(f"{name} {value:g}" for name, value in wanted.items())
        raise InputError(f"--resources: no node has {asked}; the cluster has {_described(nodes)}.")


def _described(nodes: list[dict[str, float]]) -> str:
    """``2 nodes with CPU 4, memory 8e+09``."""
    kinds = Counter(
        ", ".join(
            f"{name} {value:.3g}"
            for name, value in sorted(node.items())
            if not name.startswith("node:") and name != "object_store_memory"
        )
        for node in nodes
    )
    return "; ".join(f"{count} node{'s' if count > 1 else ''} with {kind}" for kind, count in kinds.items())
