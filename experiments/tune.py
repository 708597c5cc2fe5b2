"""Tuning: options of a strategy chosen on validation images of a stream's first tasks, as many trials for each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from avalanche.benchmarks import CLScenario

from experiments.compare import choose_device, taken
from experiments.engines import Engine, make_engine
from experiments.options import flatten, whole
from experiments.plan import Experiment, read_experiment, short
from experiments.run import check_writable
from experiments.search import Space, spaces
from experiments.study import RunTrial, StrategyStudy, open_journal, plain, words
from lifelong_ens.errors import InputError
from lifelong_ens.store import write_bytes
from streams.benchmark import without_test

HEADER = "# Written by lifelong-ens tune, for: lifelong-ens compare --config FILE --seeds 5\n"
SHOWN = 3


@dataclass(frozen=True)
class Tuned:
    """What the trials found; ``trials`` has one row for each, best first within a strategy."""

    trials: pd.DataFrame

    def headline(self) -> pd.DataFrame:
        """The table to print: the best trials of every strategy."""
        best: Any = (
            self.trials[self.trials["state"] == "finished"].groupby("strategy", sort=False).head(SHOWN)
        )
        own = [
            name for name in best.columns if name not in ("strategy", "trial", "state", "flops", "seconds")
        ]
        accuracy, *options = own
        columns = {
            "strategy": best["strategy"],
            "trial": best["trial"].astype(str),
            "validation accuracy %": [f"{100 * value:.2f}" for value in best[accuracy]],
            "options": [words(row) for row in best[options].to_dict("records")],
            "training time": [f"{value:.2f} s" for value in best["seconds"]],
        }
        return pd.DataFrame(columns)


@dataclass(frozen=True)
class TuningPlan:
    """A search that is ready to run."""

    experiment: Experiment
    spaces: Mapping[str, Mapping[str, Space]]
    num_tasks_used: int
    trials: int
    out: Path
    device: str
    engine: Engine | None = None

    def run(self) -> Tuned:
        """Run the trials that are missing, then write ``tuned.yaml`` and ``trials.csv``.

        With an engine all strategies are searched at once. The trials of one still follow each other, for each is
        proposed from what the ones before it found, so that the same options are tried whatever runs them.

        Raises:
            InputError: The stream has no validation images, or the study in the folder is another one.
            NonFiniteLossError: Every trial of a strategy met a loss that is no number.
        """
        check_writable(self.out)
        choose_device(self.device)
        studies = self.studies(self.out / "study.journal")
        run_trial = RunTrial(self.experiment, replace(self, engine=None).benchmark, self.device)
        for seed in self.experiment.seeds:
            run_trial.benchmark(seed)
        for study in studies:
            study.check(self.out / "study.journal")
        if self.engine is None:
            for study in studies:
                _search_in_turn(study, self.trials, run_trial)
        else:
            with self.engine:
                self._search_at_once(studies, run_trial, self.engine)
        tuned = Tuned(_table([row for study in studies for row in study.rows()]))
        write_bytes(self.out / "trials.csv", tuned.trials.to_csv(index=False).encode())
        write_bytes(self.out / "tuned.yaml", (HEADER + self._yaml(studies)).encode())
        return tuned

    def _search_at_once(self, studies: Sequence[StrategyStudy], run_trial: RunTrial, engine: Engine) -> None:
        """One trial of every strategy at a time."""
        waiting: dict[Future[Any], tuple[StrategyStudy, Any]] = {}

        def submit(study: StrategyStudy, search: Any, ask: Callable[[], Mapping[str, Any]]) -> None:
            with contextlib.suppress(StopIteration):
                trial = study.strategy, ask()
                waiting[engine.submit(run_trial, trial, f"a trial of {study.strategy}")] = study, search

        for study in studies:
            search = study.search(self.trials)
            submit(study, search, functools.partial(next, search))
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                study, search = waiting.pop(future)
                error = future.exception()
                tell = (search.send, future.result()) if error is None else (search.throw, error)
                submit(study, search, functools.partial(*tell))

    def studies(self, journal: Path) -> list[StrategyStudy]:
        """One for each strategy, all in one journal."""
        storage = open_journal(journal)
        return [
            StrategyStudy(self.experiment, strategy, spaces, self.num_tasks_used, storage)
            for strategy, spaces in self.spaces.items()
        ]

    def benchmark(self, seed: int) -> CLScenario:
        """The only benchmark that a trial sees: it has no test images."""
        make = self.experiment.make_benchmark
        whole = make(**taken(make, {"seed": seed}))
        name, num_tasks = self.experiment.stream.name, len(whole.streams["train"])
        if "valid" not in whole.streams:
            raise InputError(
                f"tune needs validation images and {name} has none: give --validation 0.1 to hold out a tenth of its "
                "training images (a stream of your own returns a benchmark with a stream called valid)."
            )
        if self.num_tasks_used > num_tasks:
            raise InputError(f"--num_tasks_used {self.num_tasks_used}: {name} has {num_tasks} tasks.")
        return without_test(whole, self.num_tasks_used)

    def _yaml(self, studies: Sequence[StrategyStudy]) -> str:
        """What was given, as it was given, with what was found for each strategy."""
        content: dict[str, Any] = {
            "stream": self.experiment.stream.name,
            "network": self.experiment.network.name,
            "strategies": [study.strategy for study in studies],
        }
        own = {short(study.strategy): study.best_options() for study in studies}
        for name, value in self.experiment.given.items():
            owner, _, option = name.partition(".")
            if owner in own and option:
                own[owner].setdefault(option, value)
            else:
                content[name] = value
        content |= own | {"tuning": {study.strategy: study.protocol() for study in studies}}
        return yaml.safe_dump(plain(content), sort_keys=False, width=100)


def _search_in_turn(study: StrategyStudy, trials: int, run_trial: RunTrial) -> None:
    """One trial after the other, in this process."""
    search = study.search(trials)
    with contextlib.suppress(StopIteration):
        options = next(search)
        while True:
            try:
                outcome = run_trial((study.strategy, options))
            except InputError as error:
                search.throw(error)
            else:
                options = search.send(outcome)


def plan_tuning(parsed: Mapping[str, Any], rest: Sequence[str]) -> TuningPlan:
    """Everything checked that can be checked before anything is trained.

    Args:
        parsed: General options from the command line, None where not given, and ``config``.
        rest: The other arguments, options of stream, network, strategies and training.

    Raises:
        InputError: Something named or given cannot be used, or Optuna is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise InputError("tune needs Optuna: pip install 'lifelong-ens[tune]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    experiment = read_experiment(parsed, rest)
    general = experiment.general
    return TuningPlan(
        experiment,
        spaces(_search(general["search"]), experiment.strategies, experiment.given),
        whole("num_tasks_used", general["num_tasks_used"]),
        whole("trials", general["trials"]),
        Path(general["out"] or Path("results") / f"{short(experiment.stream.name)}-tune"),
        str(general["device"]),
        make_engine(general),
    )


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The trials with their costs in the last columns."""
    costs = ("flops", "seconds")
    names = dict.fromkeys(name for row in rows for name in row)
    return pd.DataFrame(rows, columns=pd.Index([*(name for name in names if name not in costs), *costs]))


def _search(written: Any) -> dict[str, Any] | None:
    """``OPTION=SPACE`` from the command line, or a mapping from a YAML file, as option to space."""
    if written is None or isinstance(written, Mapping):
        return None if written is None else flatten(written)
    search = {}
    for text in written if isinstance(written, list) else [written]:
        name, equals, space = str(text).partition("=")
        if not equals:
            raise InputError(f"--search {text}: expected OPTION=SPACE, such as learning_rate=log:1e-3:1e-1.")
        search[name.replace("-", "_")] = space
    return search
