"""What a folder says of runs that have no record: one small file for each, from its start until it is finished."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from experiments.run import Named
from lifelong_ens.report.status import FOLDER, SCHEMA
from lifelong_ens.store import write_json


class AnyCell(Protocol):
    """One run of a comparison."""

    @property
    def key(self) -> str:
        """The name of its files."""
        ...

    @property
    def setting(self) -> str:
        """The same for what may be compared."""
        ...

    @property
    def seed(self) -> int:
        """Of everything random."""
        ...

    @property
    def named(self) -> Named:
        """The strategy or method and its options."""
        ...

    def label(self) -> str:
        """For people."""
        ...


def announce(cells: Iterable[AnyCell], out: Path) -> None:
    """Write down what is going to run."""
    for cell in cells:
        _write(cell, out)


def has_record(cell: AnyCell, out: Path) -> bool:
    """Whether a cell was run before."""
    return (out / "records" / f"{cell.key}.json").exists()


def note_status(cell: AnyCell, written: dict[str, Any], out: Path) -> None:
    """Write down how far a cell is, for ``watch`` and for a page that is made meanwhile; see ``as_written``."""
    _write(cell, out, status=written)


def note_problem(cell: AnyCell, problem: Exception, out: Path) -> None:
    """Write down why a cell did not finish."""
    _write(cell, out, problem=str(problem))


def note_finished(cell: AnyCell, out: Path) -> None:
    """A cell has its record; with the last one the folder goes."""
    (out / FOLDER / f"{cell.key}.json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (out / FOLDER).rmdir()


def _write(
    cell: AnyCell, out: Path, problem: str | None = None, status: dict[str, Any] | None = None
) -> None:
    about = {"setting": cell.setting, "seed": cell.seed, "problem": problem, "status": status}
    write_json(out / FOLDER / f"{cell.key}.json", {"schema": SCHEMA, **cell.named.as_dict(), **about})
