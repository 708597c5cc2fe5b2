"""The cells of a comparison, one after the other in this process or all at once by an engine."""

from __future__ import annotations

import contextlib
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, Protocol

from experiments.engines import Engine, LostWorkerError
from experiments.progress import Display
from experiments.run import check_writable
from experiments.unfinished import AnyCell, announce, note_finished, note_problem
from lifelong_ens.errors import InputError, NonFiniteLossError, UnfitNetworkError
from lifelong_ens.store import write_bytes

Item = tuple[Any, Any]
# what is wrong with one cell alone; the others go on
PROBLEMS = (NonFiniteLossError, UnfitNetworkError, LostWorkerError)


class Work(Protocol):
    """Runs a cell, here or, with everything in its attributes, in a worker."""

    def __call__(self, item: Item, out: Path, display: Display) -> dict[str, Any]:
        """Run a cell in a folder and return its record, which is then in ``out/records``.

        Args:
            item: The cell, and what else belongs to it.
            out: Where its files go.
            display: That is told how far it is.

        Raises:
            InputError: It cannot be run; the others can if it is one of ``PROBLEMS``.
        """
        ...


def run_grid(
    items: Sequence[Item],
    work: Work,
    finished: Callable[[Any], Mapping[str, Any] | None],
    *,
    out: Path,
    progress: bool,
    engine: Engine | None = None,
) -> list[tuple[Any, InputError]]:
    """Run every cell that has no record yet.

    Args:
        items: Cells, each with what else ``work`` needs.
        work: Runs one of them.
        finished: The record of a cell that has one.
        out: The folder of records.
        progress: Whether to show what runs.
        engine: Where they run; None for this process, one after the other.

    Returns:
        The cells that could not be run, and why.
    """
    records = [(item, finished(item[0])) for item in items]
    todo = [item for item, record in records if record is None]
    # an engine that cannot be had is no reason to write anything
    with engine if engine is not None and todo else contextlib.nullcontext():
        announce([cell for cell, _ in todo], out)
        display = Display([cell for cell, _ in items], out, progress)
        for (cell, _), record in records:
            if record is not None:
                display.finished(cell, record)
        try:
            if engine is None or not todo:
                problems = _one_after_the_other(todo, work, out, display)
            else:
                problems = _all_at_once(todo, work, out, display, engine)
        except KeyboardInterrupt as stop:
            stop.args = (display.say_stopped(),)
            raise
    unfinished = {cell.key for cell, _ in problems}
    for cell, _ in todo:
        # a worker that was taken for dead may have said how far it is after another one had finished
        if cell.key not in unfinished:
            note_finished(cell, out)
    return problems


def _one_after_the_other(
    items: Sequence[Item], work: Work, out: Path, display: Display
) -> list[tuple[Any, InputError]]:
    problems = []
    for item in items:
        try:
            _settle(item[0], work(item, out, display), display)
        except PROBLEMS as problem:
            _give_up(item[0], problem, display)
            problems.append((item[0], problem))
    return problems


def _all_at_once(
    items: Sequence[Item], work: Work, out: Path, display: Display, engine: Engine
) -> list[tuple[Any, InputError]]:
    problems = []
    with _signed(out) as sign, display.following(engine.heard):
        in_worker = InWorker(work, sign, engine.sender())
        futures = {engine.submit(in_worker, item, item[0].label()): item[0] for item in items}
        for future in as_completed(futures):
            cell = futures[future]
            try:
                record, files = future.result()
            except PROBLEMS as problem:
                _give_up(cell, problem, display)
                problems.append((cell, problem))
                continue
            for name, data in files.items():
                write_bytes(out / name, data)
            _settle(cell, record, display)
    return problems


def _settle(cell: AnyCell, record: Mapping[str, Any], display: Display) -> None:
    note_finished(cell, display.out)
    display.finished(cell, record)
    display.say(record, cell)


def _give_up(cell: AnyCell, problem: InputError, display: Display) -> None:
    note_problem(cell, problem, display.out)
    display.failed(cell, problem)


@contextlib.contextmanager
def _signed(out: Path) -> Iterator[Path]:
    """A file in a folder while workers run; those that find it share the folder with the driver."""
    path = out.resolve() / f".workers-{secrets.token_hex(6)}.tmp"
    write_sign(path)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def write_sign(path: Path) -> None:
    """Leave it where workers look for it."""
    write_bytes(path, b"")


class InWorker:
    """Runs a cell in a worker, in the driver's folder where the worker sees that, or else in one of its own.

    Args:
        work: Runs the cell.
        sign: A file in the driver's folder.
        send: How the driver is told how far the cell is, where it cannot read it.
    """

    def __init__(self, work: Work, sign: Path, send: Callable[[Any], object] | None) -> None:
        self.work, self.sign, self.send = work, sign, send

    def __call__(self, item: Item) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The record, and the files that the driver cannot read, by name.

        Raises:
            InputError: The cell cannot be run, or the driver's folder cannot be written to from here.
        """
        shared = self.sign.parent
        if self.sign.exists():
            try:
                check_writable(shared)
            except InputError as error:
                raise InputError(f"the worker on {socket.gethostname()} {error}") from error
            return self.work(item, shared, Display([item[0]], shared, shown=False)), {}
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch)
            record = self.work(item, out, Display([item[0]], out, shown=False, send=self.send))
            paths = sorted(path for path in out.rglob("*") if path.is_file())
            return record, {str(path.relative_to(out)): path.read_bytes() for path in paths}
