"""What ``compare --dry_run`` shows: all that is going to be run, and what it will cost, before anything is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from avalanche.benchmarks import CLScenario
from tabulate import tabulate

from experiments.compare import BuildStrategy, choose_device, taken, warm_up
from experiments.estimate import Estimate, estimate
from experiments.plan import Plan
from experiments.run import Cell, device_name, finished_record
from lifelong_ens.errors import InputError
from lifelong_ens.report.headline import duration, quantity

log = logging.getLogger(__name__)


@dataclass
class Row:
    """One strategy: its cells, and what one of them costs.

    Attributes:
        done: Finished tasks of every cell, ``num_tasks`` where its record is there.
        num_tasks: Of the stream.
        estimate: Of one run; None where there is none.
        problem: Why there is none.
    """

    num_tasks: int
    done: list[int] = field(default_factory=list)
    estimate: Estimate | None = None
    problem: str = ""

    @property
    def unfinished(self) -> int:
        """Cells that are still to be trained, or to be finished."""
        return sum(done < self.num_tasks for done in self.done)

    def left(self) -> tuple[float, float]:
        """FLOPs and seconds of the training that is left, of all cells."""
        if self.estimate is None:
            return math.nan, math.nan
        tasks = self.estimate.tasks
        rest = [
            one for done in self.done if done < self.num_tasks for one in tasks[min(done, len(tasks) - 1) :]
        ]
        return math.fsum(one.flops for one in rest), math.fsum(one.seconds for one in rest)


def dry_run(plan: Plan) -> str:
    """The stream, a table with a row for every strategy, and what else is to be known of a plan; nothing is written.

    Raises:
        InputError: There are no images, or no such device.
    """
    device = choose_device(plan.device)
    first = plan.cells[0][0]
    benchmark = plan.make_benchmark(**taken(plan.make_benchmark, {"seed": first.seed}))
    warm_up(device)
    rows: dict[str, Row] = {}
    for cell, build in plan.cells:
        name = cell.strategy.name
        if name not in rows:
            log.info("%s: its first steps", name)
            rows[name] = _row(cell, _builder(build, benchmark, device), benchmark)
        rows[name].done.append(_tasks_done(cell, plan, rows[name].num_tasks))
    lines = [
        *_about(first, benchmark),
        f"out: {plan.out}; device: {device_name(device)}",
        "",
        _table(rows),
        "",
        *_notes(rows),
    ]
    return "\n".join(lines)


def _builder(build: BuildStrategy, benchmark: CLScenario, device: Any) -> Callable[[int], Any]:
    return lambda seed: build(**taken(build, {"device": device, "benchmark": benchmark, "seed": seed}))


def _row(cell: Cell, build: Callable[[int], Any], benchmark: CLScenario) -> Row:
    row = Row(len(benchmark.streams["train"]))
    try:
        row.estimate = estimate(build, benchmark, cell.seed)
    except InputError as error:
        row.problem = str(error)
    return row


def _tasks_done(cell: Cell, plan: Plan, num_tasks: int) -> int:
    """How many tasks of a cell need not be trained any more."""
    if plan.force:
        return 0
    if finished_record(cell, plan.out) is not None:
        return num_tasks
    checkpoints = (plan.out / "checkpoints" / cell.key).glob("task_*.json")
    return max((int(path.stem.removeprefix("task_")) for path in checkpoints), default=0)


def _about(cell: Cell, benchmark: CLScenario) -> list[str]:
    """Stream, network and training in a line each."""
    tests: list[Any] = [one.dataset for one in benchmark.streams["test"]]
    trains: list[Any] = [one.dataset for one in benchmark.streams["train"]]
    classes = [len(set(map(int, one.targets))) for one in tests]
    fit = cell.fit
    stream = (
        f"stream: {cell.stream.name}, {len(trains)} tasks of {_range(classes)} classes, each with "
        f"{_range([len(one) for one in trains])} training and {_range([len(one) for one in tests])} test images"
    )
    training = f"{fit['epochs']} epochs a task, batches of {fit['batch_size']}" if fit else "as given"
    return [stream, f"network: {cell.network.name}; training: {training}"]


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _table(rows: Mapping[str, Row]) -> str:
    lines = [_cells(name, row) for name, row in rows.items()]
    left = [row.left() for row in rows.values()]
    total = dict.fromkeys(lines[0], "")
    total |= {
        "strategy": "total",
        "runs": str(sum(len(row.done) for row in rows.values())),
        "to do": f"{sum(row.unfinished for row in rows.values())} runs",
        "FLOPs to do": quantity([_sum(flops for flops, _ in left)]),
        "time to do": _time(_sum(seconds for _, seconds in left)),
    }
    return tabulate([*lines, total], headers="keys", tablefmt="simple", disable_numparse=True)


def _cells(name: str, row: Row) -> dict[str, str]:
    flops, seconds = row.left()
    one = row.estimate
    size = "≥ " if one is not None and one.at_least else ""
    cost = "" if one is None else "≈ " if one.at_least else "≤ " if one.at_most else ""

    def number(value: Callable[[Estimate], float], unit: str = "", mark: str = "") -> str:
        return "–" if one is None else mark + quantity([value(one)], unit)

    return {
        "strategy": name,
        "runs": str(len(row.done)),
        "to do": _states(row),
        "parameters": number(lambda one: one.parameters, mark=size),
        "bytes": number(lambda one: one.bytes, "B", size),
        "on disk": number(lambda one: one.disk_bytes, "B", size),
        "FLOPs of a run": number(lambda one: one.flops_training, mark=cost),
        "time of a run": "–" if one is None else cost + _time(one.seconds_training),
        "FLOPs to do": "–" if one is None else cost + quantity([flops]),
        "time to do": "–" if one is None else cost + _time(seconds),
    }


def _states(row: Row) -> str:
    """``2 new, 1 after task 3, 2 finished``."""
    begun = [done for done in row.done if 0 < done < row.num_tasks]
    parts = [f"{row.done.count(0)} new"] if 0 in row.done else []
    parts += [f"{begun.count(done)} after task {done}" for done in sorted(set(begun))]
    if finished := row.done.count(row.num_tasks):
        parts.append(f"{finished} finished")
    return ", ".join(parts)


def _notes(rows: Mapping[str, Row]) -> list[str]:
    notes = [
        "Estimated by the first steps of every task with the first seed; time is of training alone, here and now."
    ]
    for name, row in rows.items():
        if row.problem:
            notes.append(f"– {name}: {row.problem}")
        if row.estimate is not None and row.estimate.at_least:
            notes.append(
                f"≥ {name}: {row.estimate.at_least}, so that its size is not known before it is trained"
            )
        if row.estimate is not None and row.estimate.at_most:
            notes.append(f"≤ {name}: {row.estimate.at_most}")
    estimates = [row.estimate for row in rows.values() if row.estimate is not None]
    between = next((one for one in estimates if len(one.measured) < len(one.tasks)), None)
    if between is not None:
        tasks = ", ".join(str(task + 1) for task in between.measured)
        notes.append(f"Steps of tasks {tasks} were measured; those between cost what lies between.")
    return notes


def _sum(values: Any) -> float:
    """Of those that are known."""
    return math.fsum(value for value in values if not math.isnan(value))


def _time(seconds: float) -> str:
    return "0" if seconds == 0 else duration([seconds])
