"""The study of one strategy: its trials, each on a benchmark without test images, kept in a journal."""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import IO, TYPE_CHECKING, Any

import torch
from avalanche.benchmarks import CLScenario
from tqdm import tqdm

from experiments.compare import choose_device, warm_up
from experiments.options import flatten
from experiments.plan import Experiment
from experiments.run import Named, Run
from experiments.search import Space
from lifelong_ens.errors import DamagedFileError, InputError, NonFiniteLossError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial

OBJECTIVE = "mean accuracy over the tasks after the last of them, mean over seeds"
# what all studies in one file have in common; the rest is a strategy's own
SHARED = ("stream", "network", "fit", "num_tasks_used", "seeds")


@dataclass(frozen=True)
class StrategyStudy:
    """The trials of one strategy, kept in a journal as an Optuna study of the strategy's name.

    What a trial proposes depends only on the seed and on the trials that were finished before it, so a search that
    was stopped goes on as if it had not been.
    """

    experiment: Experiment
    strategy: str
    spaces: Mapping[str, Space]
    num_tasks_used: int
    storage: JournalStorage

    @property
    def space(self) -> dict[str, Any]:
        """What makes trials comparable: all that they share, and where they search."""
        fixed = self.experiment.options(self.strategy)
        named = Named(
            self.strategy, {name: value for name, value in fixed.items() if name not in self.spaces}
        )
        return plain(
            {
                "stream": self.experiment.stream.as_dict(),
                "network": self.experiment.network.as_dict(),
                "strategy": named.as_dict(),
                "fit": self.experiment.fit.as_dict(),
                "search": {name: space.text for name, space in self.spaces.items()},
                "num_tasks_used": self.num_tasks_used,
                "seeds": self.experiment.seeds,
            }
        )

    def check(self, path: Path) -> None:
        """Start the study, or make sure that the one in the file is this one.

        Raises:
            InputError: It is not, or a study of another strategy beside it is of another stream or training.
        """
        import optuna

        study = optuna.create_study(
            study_name=self.strategy, storage=self.storage, direction="maximize", load_if_exists=True
        )
        if not study.trials:
            study.set_user_attr("space", self.space)
        for other in self.storage.get_all_studies():
            if self.storage.get_all_trials(other._study_id, deepcopy=False):
                keys = None if other.study_name == self.strategy else SHARED
                space = other.user_attrs.get("space", {})
                _check_same(space, self.space, keys, f"{path} ({other.study_name})")

    def search(self, trials: int) -> Generator[dict[str, Any], dict[str, Any], None]:
        """Options to be tried, one set after the other until so many trials are finished.

        To each the answer is its outcome, as ``RunTrial`` has it, or the ``InputError`` that it met.
        """
        import optuna

        study = optuna.load_study(study_name=self.strategy, storage=self.storage)
        for interrupted in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(interrupted.number, state=optuna.trial.TrialState.FAIL)
        distributions = {name: _distribution(space) for name, space in self.spaces.items()}
        with tqdm(desc=self.strategy, total=trials, unit="trial", disable=None, leave=False) as bar:
            while (done := len(self.finished())) < trials:
                bar.n = done
                bar.set_postfix_str(f"best {100 * self.best().value:.2f} %" if done else "")  # pyright: ignore
                study.sampler = optuna.samplers.TPESampler(seed=self.experiment.seeds[0] * 1_000_003 + done)
                first = self.defaults()
                waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
                if not done and first is not None and not waiting:
                    study.enqueue_trial(first)
                trial = study.ask(distributions)
                try:
                    outcome = yield trial.params
                except InputError as error:
                    raise InputError(f"{self.strategy} with {words(trial.params)}: {error}") from error
                trial.set_user_attr("outcome", outcome)
                study.tell(trial, outcome["validation_accuracy"])

    def finished(self) -> list[FrozenTrial]:
        """The trials that count, those with a loss that was no number included."""
        return [trial for trial in self._trials() if trial.state.name == "COMPLETE"]

    def best(self) -> FrozenTrial:
        """The first of the trials with the highest accuracy."""
        return max(self.finished(), key=lambda trial: trial.value)  # pyright: ignore

    def best_options(self) -> dict[str, Any]:
        """What was chosen.

        Raises:
            NonFiniteLossError: No trial was good for anything.
        """
        diverged = self.best().user_attrs["outcome"]["diverged"]
        if diverged:
            raise NonFiniteLossError(
                f"every trial of {self.strategy} failed, such as {diverged}; search lower"
            )
        return dict(self.best().params)

    def defaults(self) -> dict[str, Any] | None:
        """The default of every option that is searched, for the first trial; None where one is out of its range."""
        known = {
            **asdict(self.experiment.fit),
            **self.experiment.strategies[self.strategy].defaults(),
            **self.experiment.options(self.strategy),
        }
        first = {name: known[name] for name in self.spaces}
        return first if all(space.holds(first[name]) for name, space in self.spaces.items()) else None

    def protocol(self) -> dict[str, Any]:
        """How the options were chosen and what that took, for the record of every run that uses them."""
        outcomes = [trial.user_attrs["outcome"] for trial in self.finished()]
        return {
            "tuned_on": f"validation images of the first {self.num_tasks_used} tasks",
            "objective": OBJECTIVE,
            "sampler": "TPE" if self.defaults() is None else "TPE, the defaults first",
            **self.space,
            "trials": len(outcomes),
            "diverged": sum(outcome["diverged"] is not None for outcome in outcomes),
            "best": self.best_options(),
            "best_validation_accuracy": self.best().value,
            "flops": sum(outcome["flops"] for outcome in outcomes),
            "seconds": sum(outcome["seconds"] for outcome in outcomes),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row for every trial, best first."""
        rows = []
        for trial in sorted(self._trials(), key=lambda trial: 1.0 if trial.value is None else -trial.value):
            outcome = trial.user_attrs.get("outcome", {})
            ended = "diverged" if outcome.get("diverged") else "finished"
            rows.append(
                {
                    "strategy": self.strategy,
                    "trial": trial.number,
                    "state": ended if trial.state.name == "COMPLETE" else "interrupted",
                    "validation_accuracy": trial.value,
                    **trial.params,
                    "flops": outcome.get("flops"),
                    "seconds": outcome.get("seconds"),
                }
            )
        return rows

    def _trials(self) -> list[FrozenTrial]:
        study = self.storage.get_study_id_from_name(self.strategy)
        return self.storage.get_all_trials(study, deepcopy=False)


class RunTrial:
    """Trains with some options and measures on validation images; in this process or in a worker.

    Args:
        experiment: What is tuned.
        make_benchmark: The benchmark of a seed.
        device: ``auto``, or a torch device, wherever this is.
    """

    def __init__(
        self, experiment: Experiment, make_benchmark: Callable[[int], CLScenario], device: str
    ) -> None:
        self.experiment, self.make_benchmark, self.device = experiment, make_benchmark, device
        self._benchmarks: dict[int, CLScenario] = {}

    def __call__(self, trial: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What came of a strategy with these options; a loss that is no number is worth 0.

        Raises:
            InputError: The options cannot be used.
        """
        strategy, options = trial
        device = choose_device(self.device)
        warm_up(device)
        outcome = {"validation_accuracy": 0.0, "flops": 0, "seconds": 0.0, "diverged": None}
        accuracies = []
        chosen = {**self.experiment.options(strategy), **options}
        for seed in self.experiment.seeds:
            cell, build = self.experiment.cell(strategy, seed, chosen)
            benchmark = self.benchmark(seed)
            with tempfile.TemporaryDirectory() as scratch:
                run = Run(cell, benchmark, functools.partial(_build, build, benchmark, device), Path(scratch))
                try:
                    accuracies.append(fmean(run.execute()["accuracy"][-1]))
                except NonFiniteLossError as error:
                    outcome["diverged"] = str(error)
            outcome["flops"] += round(run.costs.meter.flops)
            outcome["seconds"] += run.costs.meter.seconds
            if outcome["diverged"]:
                return outcome
        return outcome | {"validation_accuracy": fmean(accuracies)}

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which reads images of its own."""
        return {**vars(self), "_benchmarks": {}}

    def benchmark(self, seed: int) -> CLScenario:
        """The only one that a trial of a seed sees; it has no test images."""
        if seed not in self._benchmarks:
            self._benchmarks[seed] = self.make_benchmark(seed)
        return self._benchmarks[seed]


class _Lock:
    """A lock that goes with its process; the files that Optuna locks with outlive a kill, and hold up the next run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        self.file = self.path.open("ab")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Let go of it."""
        if self.file is not None:
            self.file.close()


def open_journal(path: Path) -> JournalStorage:
    """Optuna's journal: JSON lines that are only ever appended to; a line that a kill cut off is dropped.

    Raises:
        DamagedFileError: The file is no journal.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    start = b'{"op_code":'
    lock = _Lock(path)
    lock.acquire()
    try:
        data = path.read_bytes()
        if data and not data.startswith(start[: len(data)]):
            raise DamagedFileError(f"{path} is not a study of tune; move it away, or choose another --out.")
        if not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
    finally:
        lock.release()
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # pyright: ignore[reportArgumentType]
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise DamagedFileError(
            f"{path} is damaged ({error}); move it away, or choose another --out."
        ) from error


def _check_same(
    found: Mapping[str, Any], here: Mapping[str, Any], keys: Sequence[str] | None, source: str
) -> None:
    """Refuse a study unless it is the one that was asked for, in all keys or in these."""
    was, now = flatten(found), flatten(here)
    for name in dict.fromkeys((*was, *now)):
        if (keys is None or name.partition(".")[0] in keys) and was.get(name) != now.get(name):
            raise InputError(
                f"{source} is a study of another space: its {name} is {was.get(name)}, here it is {now.get(name)}; "
                "repeat its options, or choose another --out."
            )


def _distribution(space: Space) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if space.choices:
        return CategoricalDistribution(space.choices)
    if isinstance(space.low, int):
        return IntDistribution(space.low, int(space.high), log=space.log)
    return FloatDistribution(space.low, space.high, log=space.log)


def _build(build: Callable[..., Any], benchmark: CLScenario, device: torch.device, seed: int) -> Any:
    return build(benchmark=benchmark, seed=seed, device=device)


def words(options: Mapping[Any, Any]) -> str:
    """Options for people; those that a strategy does not have are left out."""
    known = {
        name: value for name, value in options.items() if not (isinstance(value, float) and math.isnan(value))
    }
    return ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in known.items()
    )


def plain(value: Any) -> Any:
    """As JSON reads it back: lists, dictionaries, texts and numbers."""
    return json.loads(json.dumps(value, default=str))
