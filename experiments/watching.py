"""Looking at the runs of a folder from outside the process that runs them."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from pathlib import Path

from experiments import screen
from lifelong_ens.errors import DamagedFileError, InputError
from lifelong_ens.report.status import Status, finished_status, read_statuses
from lifelong_ens.store import read_json

# seconds between two looks at a folder; where nothing can be redrawn, between two pictures
LOOK, REPEAT = 1.0, 30.0


class Folder:
    """The runs of a folder, finished or not; a record is read once.

    Raises:
        InputError: There is no such folder, or nothing of a run in it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._records: dict[Path, tuple[int, Status | None]] = {}
        if not out.is_dir():
            raise InputError(f"no folder {out}; give the --out of a compare or ensemble that was started.")
        if not self.look():
            raise InputError(
                f"{out} holds no runs; give the --out of a compare or ensemble that was started."
            )

    def look(self) -> list[Status]:
        """How it stands with every run now."""
        # first those without a record: what is finished between the two looks is then seen twice, not never
        unfinished = read_statuses(self.out)
        finished = {}
        for path in sorted((self.out / "records").glob("*.json")):
            with contextlib.suppress(FileNotFoundError):
                changed = path.stat().st_mtime_ns
                if self._records.get(path, (0, None))[0] != changed:
                    self._records[path] = changed, _finished(path)
                status = self._records[path][1]
                finished |= {} if status is None else {path.stem: status}
        return list({**unfinished, **finished}.values())


def watch(out: Path, once: bool = False) -> None:
    """Draw the runs of a folder until none is left that could still finish, or once.

    Raises:
        InputError: There is nothing to look at.
    """
    folder = Folder(out)
    if not once:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(folder)
    statuses = folder.look()
    screen.console(stderr=False).print(screen.drawn(statuses, statuses))


def _follow(folder: Folder) -> None:
    """Draw until no run could still finish."""
    live = sys.stderr.isatty()
    shown = -REPEAT
    with screen.drawing() if live else contextlib.nullcontext(screen.console(stderr=False).print) as draw:
        statuses = folder.look()
        while any(status.state in ("waiting", "running", "stopped") for status in statuses):
            if live:
                draw(screen.drawn(statuses, statuses, shutil.get_terminal_size().lines))
            elif time.monotonic() - shown >= REPEAT:
                shown = time.monotonic()
                draw(screen.drawn(statuses, statuses))
            time.sleep(LOOK)
            statuses = folder.look()


def _finished(path: Path) -> Status | None:
    """What a record tells; None where it is damaged, which counts as not run."""
    try:
        return finished_status(read_json(path))
    except (DamagedFileError, KeyError, IndexError, TypeError):
        return None
