"""What people see while runs go on: a live table in a terminal, lines in the log elsewhere, a file for others."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from experiments import screen
from experiments.unfinished import AnyCell, has_record, note_status
from lifelong_ens.report.status import Status, finished_status
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
    """

    def __init__(self, cells: Iterable[AnyCell], out: Path, shown: bool) -> None:
        self.out, self.shown = out, shown
        self.live = shown and sys.stderr.isatty()
        self.statuses = {cell.key: _before(cell, has_record(cell, out)) for cell in cells}

    @contextmanager
    def running(self, cell: AnyCell, look: Callable[[], Status]) -> Iterator[None]:
        """Show a run while it goes on inside.

        Args:
            cell: That runs.
            look: Says how far it is; called now and then in another thread.
        """
        self.statuses[cell.key] = look()
        if self.shown and not self.live:
            number = list(self.statuses).index(cell.key) + 1
            log.info("%s: started, run %d of %d", cell.label(), number, len(self.statuses))
        beat = _Beat(self, cell, look)
        beat.start()
        try:
            yield
        except BaseException:
            beat.end()
            self._stopped(cell, look())
            raise
        beat.end()

    def finished(self, cell: AnyCell, record: Mapping[str, Any]) -> None:
        """A run has its record."""
        self.statuses[cell.key] = finished_status(record)

    def failed(self, cell: AnyCell, problem: Exception) -> None:
        """A run cannot be finished."""
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

    def _stopped(self, cell: AnyCell, status: Status) -> None:
        stopped = Status(**{**vars(status), "state": "stopped", "seconds_left": None})
        self.statuses[cell.key] = stopped
        with contextlib.suppress(OSError):
            note_status(cell, stopped, self.out)


class _Beat(threading.Thread):
    """Looks at a run twice a second: draws it, writes it down, says it now and then.

    The training hears nothing of it: it only counts, and what waits for the device or the disk waits in this thread.
    """

    def __init__(self, display: Display, cell: AnyCell, look: Callable[[], Status]) -> None:
        super().__init__(name="progress", daemon=True)
        self.display, self.cell, self.look = display, cell, look
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
                status, now = self.look(), time.monotonic()
                self.display.statuses[self.cell.key] = status
                if now - self._written >= WRITE:
                    self._written = now
                    # a folder that cannot be written to is the run's own problem, when it has something to write
                    with contextlib.suppress(OSError):
                        note_status(self.cell, status, self.display.out)
                statuses = list(self.display.statuses.values())
                if self.display.live:
                    draw = draw or stack.enter_context(screen.drawing())
                    draw(screen.drawn([status], statuses))
                elif self.display.shown and now - self._said >= SAY:
                    self._said = now
                    log.info("%s", screen.line(status, statuses))


def _before(cell: AnyCell, finished: bool) -> Status:
    state, share = ("finished", 1.0) if finished else ("waiting", 0.0)
    return Status(cell.label(), cell.named.name, state, share=share)
