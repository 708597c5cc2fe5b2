"""Runs at once, by each engine, against one after the other."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from experiments.bench.measuring import Goal, Race
from experiments.compare import RunStrategy
from experiments.engines import Engine
from experiments.engines.local import Local
from experiments.grid import run_grid
from experiments.plan import plan_comparison

TWO, ONE, HERE = "local, 2 processes", "local, 1 process", "this process"
LOCAL, RAY = "local", "ray"
# items that do nothing, of which an overhead is the mean
NOTHING = 200


def grid(
    device: torch.device,
    *,
    strategies: Sequence[str] = ("finetune", "batch_ensemble", "ewc", "lwf"),
    seeds: int = 3,
    epochs: int = 30,
) -> Iterator[Race]:
    """A grid on digits by two processes against one (1.7 times as fast) and this one; what an engine adds to a run.

    Elapsed time of processes that have been started, one thread each, from the first run to the last record; the report
    that follows is the same for all. An engine's overhead is that of a run that does nothing, by one worker.

    Args:
        device: The CPU.
        strategies: Of the grid.
        seeds: Of each.
        epochs: Of every task.
    """
    words = {"strategies": ",".join(strategies), "seeds": seeds, "device": device.type}
    plan = plan_comparison(words, ["--epochs", str(epochs)])
    items = plan.cells, RunStrategy(plan.make_benchmark, plan.device, ())
    with ExitStack() as engines:
        started = functools.partial(_started, engines)
        yield Race(
            f"{len(plan.cells)} runs of split_digits",
            {
                TWO: lambda: functools.partial(_seconds, *items, started(Local(2))),
                ONE: lambda: functools.partial(_seconds, *items, started(Local(1))),
                HERE: lambda: functools.partial(_seconds, *items, None),
            },
            (Goal(ONE, ">=", 1.7), Goal(HERE, ">=", 1.7), Goal(HERE, "<=", 1.05, ours=ONE)),
            timed=False,
        )
    with ExitStack() as engines:
        started = functools.partial(_started, engines)
        yield Race(
            "a run that does nothing",
            {
                LOCAL: lambda: functools.partial(_overhead, started(Local(1))),
                RAY: lambda: functools.partial(_overhead, started(_ray())),
            },
            (Goal(RAY, "<=", 1.0),),
            timed=False,
        )


def _started(engines: ExitStack, engine: Engine) -> Engine:
    """An engine whose workers have done something already."""
    engines.enter_context(engine)
    for future in [engine.submit(_wait, 2.0, "start") for _ in range(engine.slots)]:
        future.result()
    return engine


def _wait(seconds: float) -> None:
    """So that no worker takes what is another's to start with."""
    time.sleep(seconds)


def _ray() -> Engine:
    from experiments.engines.ray import Ray

    return Ray()


def _seconds(cells: Any, work: RunStrategy, engine: Engine | None) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        problems = run_grid(cells, work, _never, out=Path(folder), progress=False, engine=engine)
        seconds = time.perf_counter() - start
    for _, problem in problems:
        raise problem
    return seconds


def _never(cell: Any) -> None:
    """No cell has been run before."""


def _overhead(engine: Engine) -> float:
    start = time.perf_counter()
    for _ in range(NOTHING):
        engine.submit(_nothing, None, "nothing").result()
    return (time.perf_counter() - start) / NOTHING


def _nothing(item: None) -> None:
    """What is run."""
