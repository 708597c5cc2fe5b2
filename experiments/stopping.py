"""How a command is stopped: the first Ctrl-C, or SIGTERM, ends it in order, the second at once."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

SHOW_CURSOR = b"\x1b[?25h\n"
# seconds after which an interrupt that was swallowed is raised again
AGAIN = 0.1


class Stopping:
    """Signals while a command runs inside.

    The first is raised as ``KeyboardInterrupt`` where the command is. It comes to its end through ``finally`` like any
    error; files are written in one step, so that none is left half. From then on another signal ends the process
    there and then, without a traceback, whatever is being tidied up.

    Of several processes of one run the first alone hears signals; the others end when it does.

    An exception that is raised in a callback, such as those of the garbage collector, is lost: it is raised again
    until somebody handles it.

    Attributes:
        signal: The first that came; None if none did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """What shells expect of a stopped command: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    def leave(self) -> None:
        """End the process if a signal asked for it; taking all imported modules apart would take seconds more."""
        if self.signal is not None:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.exit_code)

    def __enter__(self) -> Stopping:
        self._unraisable = sys.unraisablehook
        # handlers belong to the main thread; what a parent has told to be ignored, such as nohup, stays so
        if threading.current_thread() is threading.main_thread():
            sys.unraisablehook = self._report_unraisable
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    hear = self._hear if _rank() == 0 else signal.SIG_IGN
                    self._before[number] = signal.signal(number, hear)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.unraisablehook = self._unraisable
        if self.signal is not None and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if sys.__stderr__ is not None and sys.__stderr__.isatty():
                os.write(2, SHOW_CURSOR)
            os._exit(128 + number)
        self.signal = number
        if hasattr(signal, "setitimer"):
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._raise_unless_handled)
            signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
        raise KeyboardInterrupt

    def _raise_unless_handled(self, number: int, frame: FrameType | None) -> None:
        """Called again and again after the first signal, in whatever the main thread does."""
        handled = sys.exception()
        while handled is not None:
            if isinstance(handled, KeyboardInterrupt):
                return
            handled = handled.__context__
        raise KeyboardInterrupt

    def _report_unraisable(self, lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            self._unraisable(lost)


def _rank() -> int:
    """Which this is of the processes that torchrun, srun or a first process has started."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))
