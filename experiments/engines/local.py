"""Processes of this machine, each with as many threads as it is given."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Future, ThreadPoolExecutor
from typing import Any

from loky.process_executor import ProcessPoolExecutor, ShutdownExecutorError

from experiments.engines import TRIES, Engine, LostWorkerError, Parcel, cores, dumped
from experiments.engines.worker import Driver, UnknownParcelError, begin, call

log = logging.getLogger(__name__)

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Local(Engine):
    """Worker processes that stay until the engine is left.

    Each has an executor of its own, driven by a thread: all workers of one executor are ended when one of them dies.

    Args:
        jobs: How many processes; as many as the cores have room for if not given.
        threads: Of torch in each of them.
    """

    def __init__(self, jobs: int | None = None, threads: int = 1) -> None:
        super().__init__(threads)
        self.jobs = max(cores() // threads, 1) if jobs is None else jobs
        self._own = threading.local()
        self._lock = threading.Lock()
        self._processes: list[ProcessPoolExecutor] = []
        self._leaving = True
        self._driver = Driver.here(threads)

    @property
    def slots(self) -> int:
        """See ``Engine``."""
        return self.jobs

    def submit(self, function: Callable[[Any], Any], item: Any, label: str) -> Future[Any]:
        """See ``Engine``."""
        return self._drivers.submit(self._call, self.packed(function), dumped(item), label)

    def _start(self) -> None:
        self._own, self._processes, self._leaving = threading.local(), [], False
        self._drivers = ThreadPoolExecutor(self.jobs, "worker")
        log.info("starting up to %d processes", self.jobs)

    def _end(self, at_once: bool) -> None:
        with self._lock:
            self._leaving = True
        self._drivers.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.shutdown(wait=True, kill_workers=at_once)
        self._drivers.shutdown(wait=True)

    def _call(self, parcel: Parcel, item: bytes, label: str) -> Any:
        """In the thread of a worker."""
        died = ""
        for tried in range(TRIES):
            try:
                return self._ask(parcel, item)
            except (BrokenExecutor, ShutdownExecutorError) as error:
                self._own.process = None
                if self._leaving:
                    raise CancelledError from None
                died = _how(error)
                if tried + 1 < TRIES:
                    log.warning("%s: its process died%s; another one goes on with it", label, died)
        raise LostWorkerError(
            f"{label}: its process died {TRIES} times{died}; where memory runs out, take fewer --jobs"
        )

    def _ask(self, parcel: Parcel, item: bytes) -> Any:
        """The answer of this thread's worker, which is sent a function once."""
        process = self._process()
        if self._own.token == parcel.token:
            with contextlib.suppress(UnknownParcelError):
                known = Parcel(parcel.token, b"")
                return process.submit(call, known, item, self._driver).result()
        answer = process.submit(call, parcel, item, self._driver).result()
        self._own.token = parcel.token
        return answer

    def _process(self) -> ProcessPoolExecutor:
        """That of this thread."""
        process = getattr(self._own, "process", None)
        if process is None:
            limits = dict.fromkeys(THREADS, str(self.threads))
            with self._lock:
                if self._leaving:
                    raise CancelledError
                process = ProcessPoolExecutor(1, initializer=begin, initargs=(os.getpid(),), env=limits)
                self._processes.append(process)
            self._own.process, self._own.token = process, ""
        return process


def _how(error: Exception) -> str:
    """The signal, out of loky's paragraph."""
    found = re.search(r"\{(\w+)\(-?\d+\)", str(error))
    return f" ({found[1]})" if found else ""
