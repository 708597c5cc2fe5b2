"""How runs look: a line of text for a log, a table with a bar for a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lifelong_ens.report.headline import quantity
from lifelong_ens.report.status import Status

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

COLUMNS = ("run", "", "task", "epoch", "loss", "accuracy", "images/s", "left")
COLOURS = {"failed": "red", "stopped": "yellow", "finished": "green", "waiting": "dim"}
# what comes first where not all fit
ORDER = ("running", "failed", "stopped", "waiting", "finished")


def line(status: Status, statuses: Iterable[Status]) -> str:
    """One run and what is left of all, as one line of text."""
    words = [
        status.where() or status.doing,
        status.loss is not None and f"loss {status.loss:.4g}",
        status.accuracy is not None and f"accuracy {_percent(status.accuracy)}",
        status.images_per_second is not None and f"{quantity([status.images_per_second])} images/s",
        status.seconds_left is not None and f"{clock(status.seconds_left)} left",
    ]
    return f"{status.label}: {', '.join(word for word in words if word)}; {together(list(statuses))}"


def together(statuses: Sequence[Status]) -> str:
    """All runs in a few words: ``4 of 12 runs, 2:10 left, memory 812 MB``."""
    count = {state: sum(one.state == state for one in statuses) for state in ORDER}
    words = [f"{count['finished']} of {len(statuses)} run{'s' if len(statuses) != 1 else ''}"]
    words += [f"{count[state]} {state}" for state in ("failed", "stopped") if count[state]]
    left = seconds_left(statuses)
    words += [] if left is None else [f"{clock(left)} left"]
    running = [one for one in statuses if one.state == "running"]
    memory = [one.memory_bytes for one in running if one.memory_bytes]
    device = [one.device_bytes for one in running if one.device_bytes]
    words += [f"memory {quantity([max(memory)], 'B')}"] if memory else []
    words += [f"GPU {quantity([max(device)], 'B')}"] if device else []
    return ", ".join(words)


def seconds_left(statuses: Iterable[Status]) -> float | None:
    """Until all are finished; None while nothing is known.

    A run that waits is taken to need as long as those of its strategy did, or as the mean of all. What runs at once
    shares the work.
    """
    known: dict[str, list[float]] = {}
    running, left, waiting = 0, 0.0, []
    for one in statuses:
        if one.state == "running":
            running += 1
            left += one.seconds_left or 0.0
        if one.state == "finished" and one.seconds:
            known.setdefault(one.name, []).append(one.seconds)
        elif one.state == "running" and one.seconds_left is not None:
            known.setdefault(one.name, []).append(one.seconds + one.seconds_left)
        elif one.state == "waiting":
            waiting.append(one.name)
    if not running or not known:
        return None
    of_any = fmean(seconds for times in known.values() for seconds in times)
    left += sum(fmean(known[name]) if name in known else of_any for name in waiting)
    return left / running


def drawn(shown: Sequence[Status], statuses: Sequence[Status], height: int | None = None) -> RenderableType:
    """A table of some runs, the most interesting ones if not all fit into so many lines, and a bar for all."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    ordered = sorted(shown, key=lambda one: ORDER.index(one.state))
    fit = len(ordered) if height is None else max(height - 4, 1)
    table = Table.grid(padding=(0, 1), expand=True)
    for name in COLUMNS:
        first = name == "run"
        table.add_column(no_wrap=True, overflow="ellipsis", justify="left" if first or not name else "right")
    table.columns[0].ratio = 1
    table.columns[1].max_width = 17
    table.add_row(*(Text(name, style="dim") for name in COLUMNS))
    for one in ordered[:fit]:
        table.add_row(*_row(one), style=COLOURS.get(one.state, ""))
    if len(ordered) > fit:
        table.add_row(Text(f"and {len(ordered) - fit} more", style="dim"))
    reasons = [Text(f"{one.label}: {one.reason}", style="red") for one in ordered[:fit] if one.reason]
    total = Table.grid(padding=(0, 1))
    share = fmean(one.share for one in statuses) if statuses else 0.0
    total.add_row(
        ProgressBar(total=1.0, completed=share, width=16), f"{100 * share:.0f} %", together(statuses)
    )
    return Group(table, *reasons, total)


def console(stderr: bool = True) -> Console:
    """What is drawn on: stderr, for what is redrawn, or stdout."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


@contextmanager
def drawing() -> Iterator[Callable[[Any], None]]:
    """Draw in place inside; what is logged or printed to stderr meanwhile goes above it."""
    from rich.live import Live

    live = Live(console=console(), auto_refresh=False, transient=True, redirect_stdout=sys.stdout.isatty())
    to_stderr = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
    ]
    before = sys.stderr
    with live:
        for handler in to_stderr:
            handler.setStream(sys.stderr)
        try:
            yield lambda what: live.update(what, refresh=True)
        finally:
            for handler in to_stderr:
                handler.setStream(before)


def outcome(record: Mapping[str, Any]) -> str:
    """What a run came to, in a few words."""
    if "method" in record:
        test, seconds = record["uncertainty"][0], record["spent"]["seconds"]
        return f"{100 * test['accuracy']:.2f} % accuracy, NLL {test['nll']:.4f}, trained in {seconds:.1f} s"
    last = [value for value in record["accuracy"][-1] if value is not None]
    seconds = record["tasks"][-1]["seconds_training"]
    return f"{100 * sum(last) / max(len(last), 1):.1f} % average accuracy, trained in {seconds:.1f} s"


def clock(seconds: float) -> str:
    """``0:42``, ``2:10:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _row(one: Status) -> list[str]:
    running = one.state == "running"
    epochs = f"{one.epoch}/{one.epochs}" if one.epochs else str(one.epoch)
    return [
        one.label,
        one.doing if running else one.state,
        f"{one.task}/{one.num_tasks}" if one.task else "",
        epochs if one.epoch and one.state != "finished" else "",
        "" if one.loss is None or one.state == "finished" else f"{one.loss:.4f}",
        "" if one.accuracy is None else _percent(one.accuracy),
        "" if one.images_per_second is None or not running else quantity([one.images_per_second]),
        "" if one.seconds_left is None or not running else clock(one.seconds_left),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
