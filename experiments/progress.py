"""What people see while runs go on: a live table in a terminal, lines in the log elsewhere, a file for others."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from experiments import screen
from experiments.unfinished import AnyCell, has_record, note_status
from lifelong_ens.report.status import Status, as_written, finished_status, read_statuses
from lifelong_ens.report.unfinished import reached

log = logging.getLogger(__name__)

# seconds between two looks at a run, two writings of its file, two lines in the log
LOOK, WRITE, SAY = 0.5, 2.0, 30.0


class Display:
    """All runs of a command: how far each is, shown while one of them goes on.

    Args:
        cells: That the command is about.
        out: The folder in whose files the status is kept for ``watch``.
        shown: Whether to show anything; the files are written in any case.
        send: Told what is written, for a driver that cannot read the files.
    """

    def __init__(
        self,
        cells: Iterable[AnyCell],
        out: Path,
        shown: bool,
        send: Callable[[Any], object] | None = None,
    ) -> None:
        self.out, self.shown, self.send = out, shown, send
        self.live = shown and sys.stderr.isatty()
        # what is drawn and what is logged above it do not mix, nor does an old status replace a newer one
        self.lock = threading.RLock()
        self.cells = {cell.key: cell for cell in cells}
        self.statuses = {key: _before(cell, has_record(cell, out)) for key, cell in self.cells.items()}

    @contextmanager
    def running(self, cell: AnyCell, look: Callable[[], Status]) -> Iterator[None]:
        """Show a run while it goes on inside.

        Args:
            cell: That runs.
            look: Says how far it is; called now and then in another thread.
        """
        self.statuses[cell.key] = look()
        self._say_started(cell)

        def now() -> list[Status]:
            status = look()
            self.statuses[cell.key] = status
            return [status]

        def write(running: Sequence[Status]) -> None:
            for status in running:
                self.note(cell, status)

        beat = _Beat(self, now, write)
        beat.start()
        try:
            yield
        except BaseException:
            beat.end()
            self._stopped(cell, look())
            raise
        beat.end()

    @contextmanager
    def following(self, heard: Callable[[], Iterable[Any]]) -> Iterator[None]:
        """Show the runs of other processes while they go on.

        Args:
            heard: What those have sent that cannot write into the folder here.
        """

        def now() -> list[Status]:
            for key, written in heard():
                note_status(self.cells[key], written, self.out)
            for key, status in read_statuses(self.out).items():
                before = self.statuses.get(key)
                if (
                    before is not None
                    and before.state in ("waiting", "running")
                    and status.state == "running"
                ):
                    self.statuses[key] = status
                    if before.state == "waiting":
                        self._say_started(self.cells[key])
            return [status for status in self.statuses.values() if status.state == "running"]

        beat = _Beat(self, now)
        beat.start()
        try:
            yield
        except BaseException:
            beat.end()
            now()
            for key, status in self.statuses.items():
                if status.state == "running":
                    self._stopped(self.cells[key], status)
            raise
        beat.end()

    def finished(self, cell: AnyCell, record: Mapping[str, Any]) -> None:
        """A run has its record."""
        with self.lock:
            self.statuses[cell.key] = finished_status(record)

    def failed(self, cell: AnyCell, problem: Exception) -> None:
        """A run cannot be finished."""
        with self.lock:
            self.statuses[cell.key] = Status(cell.label(), cell.named.name, "failed", reason=str(problem))

    def say_stopped(self) -> str:
        """Log what there is after a run was stopped, and return that sentence."""
        finished = sum(one.state == "finished" for one in self.statuses.values())
        words = f"stopped; {finished} of {len(self.statuses)} runs are finished"
        for key, one in self.statuses.items():
            done = reached(self.out, key) if one.state == "stopped" else ""
            words += f", {one.label} is kept after {done}" if done else ""
        words += "; the same command goes on from there"
        log.warning("%s", words)
        return words

    def say(self, record: Mapping[str, Any], cell: AnyCell) -> None:
        """Log what a run that has just finished has come to."""
        if self.shown:
            with self.lock:
                log.info("%s: %s", cell.label(), screen.outcome(record))

    def note(self, cell: AnyCell, status: Status) -> None:
        """Write down how far a run is."""
        written = as_written(status)
        # a folder that cannot be written to is the run's own problem, when it has something to write
        with contextlib.suppress(OSError):
            note_status(cell, written, self.out)
        if self.send is not None:
            with contextlib.suppress(Exception):  # whoever hears it may be gone
                self.send((cell.key, written))

    def _say_started(self, cell: AnyCell) -> None:
        if self.shown and not self.live:
            number = list(self.statuses).index(cell.key) + 1
            log.info("%s: started, run %d of %d", cell.label(), number, len(self.statuses))

    def _stopped(self, cell: AnyCell, status: Status) -> None:
        stopped = Status(**{**vars(status), "state": "stopped", "seconds_left": None})
        self.statuses[cell.key] = stopped
        self.note(cell, stopped)


class _Beat(threading.Thread):
    """Looks at the runs twice a second: draws them, writes them down, says them now and then.

    The training hears nothing of it: it only counts, and what waits for the device or the disk waits in this thread.

    Args:
        display: Of all runs.
        look: Brings its statuses up to date and returns those of the runs that are going on.
        write: Writes these down.
    """

    def __init__(
        self,
        display: Display,
        look: Callable[[], Sequence[Status]],
        write: Callable[[Sequence[Status]], object] = lambda running: None,
    ) -> None:
        super().__init__(name="progress", daemon=True)
        self.display, self.look, self.write = display, look, write
        self._ended = threading.Event()
        self._said = time.monotonic()
        self._written = -WRITE

    def end(self) -> None:
        """Stop looking; what was drawn is taken off the screen."""
        self._ended.set()
        self.join()

    def run(self) -> None:
        """What the thread does."""
        with ExitStack() as stack:
            draw = None
            while not self._ended.wait(LOOK):
                running, now = self.look(), time.monotonic()
                if now - self._written >= WRITE:
                    self._written = now
                    self.write(running)
                statuses = list(self.display.statuses.values())
                if self.display.live:
                    draw = draw or stack.enter_context(screen.drawing())
                    with self.display.lock:
                        draw(screen.drawn(running, statuses))
                elif self.display.shown and now - self._said >= SAY:
                    self._said = now
                    for status in running:
                        log.info("%s", screen.line(status, statuses))


def _before(cell: AnyCell, finished: bool) -> Status:
    state, share = ("finished", 1.0) if finished else ("waiting", 0.0)
    return Status(cell.label(), cell.named.name, state, share=share)
