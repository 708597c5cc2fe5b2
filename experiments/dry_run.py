"""What ``--dry_run`` shows: all that is going to be run, and what it will cost, before anything is trained."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from avalanche.benchmarks import CLScenario
from tabulate import tabulate

from experiments.compare import BuildStrategy, choose_device, taken, warm_up
from experiments.engines import Engine
from experiments.estimate import Estimate, estimate
from experiments.plan import Plan
from experiments.run import Cell, Named, device_name, digest, finished_record
from lifelong_ens.errors import InputError
from lifelong_ens.report.headline import duration, quantity
from lifelong_ens.training.joining import started

if TYPE_CHECKING:
    from experiments.tune import TuningPlan

log = logging.getLogger(__name__)


@dataclass
class Row:
    """One strategy or method with its options: its runs, and what one of them costs.

    Attributes:
        num_tasks: Of the stream; 1 for an ensemble.
        done: Finished tasks of every run, ``num_tasks`` where its record is there.
        estimate: Of one run; None where there is none.
        problem: Why there is none.
        unmeasured: Runs among those that are done whose model is there, to be measured in another way.
    """

    num_tasks: int
    done: list[int] = field(default_factory=list)
    estimate: Estimate | None = None
    problem: str = ""
    unmeasured: int = 0

    @classmethod
    def of(cls, num_tasks: int, make: Callable[[], Estimate]) -> Row:
        """A row with its estimate, or with the reason why there is none."""
        try:
            return cls(num_tasks, estimate=make())
        except InputError as error:
            return cls(num_tasks, problem=str(error))

    @property
    def unfinished(self) -> int:
        """Runs that are still to be trained, or to be finished."""
        return sum(done < self.num_tasks for done in self.done)

    def left(self) -> tuple[float, float]:
        """FLOPs and seconds of the training that is left, of all runs."""
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
        InputError: There are no images, or no such device, or several devices are asked for.
    """
    if started() is not None or (plan.devices or 1) > 1:
        raise InputError("--dry_run measures on one device: leave out --devices, torchrun and srun.")
    device = choose_device(plan.device)
    first = plan.cells[0][0]
    benchmark = plan.make_benchmark(**taken(plan.make_benchmark, {"seed": first.seed}))
    warm_up(device)
    rows: dict[str, Row] = {}
    labels = labels_of([cell.strategy for cell, _ in plan.cells])
    for name, (cell, build) in zip(labels, plan.cells, strict=True):
        if name not in rows:
            rows[name] = row_of_strategy(name, build, benchmark, cell.seed, device)
        rows[name].done.append(_tasks_done(cell, plan, rows[name].num_tasks))
    about = about_stream(first.stream.name, first.network.name, first.fit, benchmark)
    return overview([*about, where(plan.out, device)], rows, "strategy", in_turn(plan.engine))


def dry_run_tuning(plan: TuningPlan) -> str:
    """The same of a search: trials that are missing, each with the options as they were given.

    Raises:
        InputError: There are no validation images, or the study in the folder is another one.
    """
    device, experiment = choose_device(plan.device), plan.experiment
    seeds = experiment.seeds
    benchmark = plan.benchmark(seeds[0])
    finished = _finished_trials(plan)
    warm_up(device)
    rows: dict[str, Row] = {}
    for strategy, done in finished.items():
        _, build = experiment.cell(strategy, seeds[0], experiment.options(strategy))
        row = rows[strategy] = row_of_strategy(strategy, build, benchmark, seeds[0], device)
        left = max(plan.trials - done, 0)
        row.done = len(seeds) * ([row.num_tasks] * done + [0] * left)
    fit = asdict(experiment.fit)
    about = about_stream(experiment.stream.name, experiment.network.name, fit, benchmark, "validation")
    trials = (
        f"trials: {plan.trials} of each strategy, each with {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    )
    searched = {strategy: ", ".join(spaces) for strategy, spaces in plan.spaces.items()}
    note = "Trials have other options, and may cost more or less: " + "; ".join(
        f"{strategy} searches {names}" for strategy, names in searched.items()
    )
    return overview(
        [*about, trials, where(plan.out, device)], rows, "strategy", [note, *in_turn(plan.engine)]
    )


def _finished_trials(plan: TuningPlan) -> dict[str, int]:
    """How many trials each strategy has behind it; the journal is read in a copy, as opening one may write."""
    journal = plan.out / "study.journal"
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / journal.name
        if journal.exists():
            shutil.copyfile(journal, copied)
        studies = plan.studies(copied)
        for study in studies:
            study.check(journal)
        return {study.strategy: len(study.finished()) for study in studies}


def row_of_strategy(
    name: str, build: BuildStrategy, benchmark: CLScenario, seed: int, device: torch.device
) -> Row:
    """What a run of a strategy costs; none of its runs is in the row yet."""
    log.info("%s: its first steps", name)
    num_tasks = len(benchmark.streams["train"])
    return Row.of(num_tasks, lambda: estimate(_builder(build, benchmark, device), benchmark, seed))


def labels_of(named: Sequence[Named]) -> list[str]:
    """The name of each, with its options where the name stands there with others too."""
    options = {
        one.name: {digest(other.options) for other in named if other.name == one.name} for one in named
    }
    return [
        f"{one.name}({', '.join(f'{name}={value}' for name, value in one.options.items())})"
        if len(options[one.name]) > 1 and one.options
        else one.name
        for one in named
    ]


def where(out: Path, device: torch.device) -> str:
    """A line on the folder that is not written to, and on what computes."""
    return f"out: {out}; device: {device_name(device)}"


def in_turn(engine: Engine | None) -> list[str]:
    """What an engine has to do with the times."""
    return (
        []
        if engine is None
        else ["Times are those of one run after the other; an engine runs several at once."]
    )


def overview(about: Sequence[str], rows: Mapping[str, Row], kind: str, notes: Sequence[str] = ()) -> str:
    """What is run, the table, and what is to be known of it.

    Args:
        about: A line each.
        rows: By label.
        kind: What a row is: ``strategy`` or ``method``.
        notes: What else is to be known.
    """
    return "\n".join([*about, "", _table(rows, kind), "", *_notes(rows), *notes])


def _builder(build: BuildStrategy, benchmark: CLScenario, device: Any) -> Callable[[int], Any]:
    return lambda seed: build(**taken(build, {"device": device, "benchmark": benchmark, "seed": seed}))


def _tasks_done(cell: Cell, plan: Plan, num_tasks: int) -> int:
    """How many tasks of a cell need not be trained any more."""
    if plan.force:
        return 0
    if finished_record(cell, plan.out) is not None:
        return num_tasks
    checkpoints = (plan.out / "checkpoints" / cell.key).glob("task_*.json")
    return max((int(path.stem.removeprefix("task_")) for path in checkpoints), default=0)


def about_stream(
    stream: str, network: str, fit: Mapping[str, Any], benchmark: CLScenario, asked: str = "test"
) -> list[str]:
    """Stream, network and training in a line each; ``asked`` is what images stand where the test images do."""
    tests: list[Any] = [one.dataset for one in benchmark.streams["test"]]
    trains: list[Any] = [one.dataset for one in benchmark.streams["train"]]
    classes = [len(set(map(int, one.targets))) for one in tests]
    return [
        f"stream: {stream}, {len(trains)} tasks of {_range(classes)} classes, each with "
        f"{_range([len(one) for one in trains])} training and {_range([len(one) for one in tests])} {asked} images",
        about_training(network, fit, "a task"),
    ]


def about_training(network: str, fit: Mapping[str, Any], of: str) -> str:
    """A line on the network and how it is trained."""
    training = f"{fit['epochs']} epochs {of}, batches of {fit['batch_size']}" if fit else "as given"
    return f"network: {network}; training: {training}"


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _table(rows: Mapping[str, Row], kind: str) -> str:
    lines = [{kind: name, **_cells(row)} for name, row in rows.items()]
    left = [row.left() for row in rows.values()]
    total = dict.fromkeys(lines[0], "")
    total |= {
        kind: "total",
        "runs": str(sum(len(row.done) for row in rows.values())),
        "to do": f"{sum(row.unfinished for row in rows.values())} runs",
        "FLOPs to do": quantity([_sum(flops for flops, _ in left)]),
        "time to do": _time(_sum(seconds for _, seconds in left)),
    }
    return tabulate([*lines, total], headers="keys", tablefmt="simple", disable_numparse=True)


def _cells(row: Row) -> dict[str, str]:
    flops, seconds = row.left()
    one = row.estimate
    size, cost = (
        "" if bound is None else f"{bound.mark} "
        for bound in ((None, None) if one is None else (one.size, one.cost))
    )

    def number(value: Callable[[Estimate], float], unit: str = "", mark: str = "") -> str:
        return "–" if one is None else mark + quantity([value(one)], unit)

    return {
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
    if row.unmeasured:
        parts.append(f"{row.unmeasured} to be measured")
    if finished := row.done.count(row.num_tasks) - row.unmeasured:
        parts.append(f"{finished} finished")
    return ", ".join(parts)


def _notes(rows: Mapping[str, Row]) -> list[str]:
    notes = [
        "Estimated by the first steps of every training with the first seed; time is of training alone, here and now."
    ]
    for name, row in rows.items():
        if row.problem:
            notes.append(f"– {name}: {row.problem}")
        if row.estimate is not None:
            bounds = {
                bound.why: bound for bound in (row.estimate.cost, row.estimate.size) if bound is not None
            }
            notes += [f"{bound.mark} {name}: {bound.why}" for bound in bounds.values()]
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
