"""Tuning: options of a strategy chosen on validation images of a stream's first tasks, as many trials for each."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import yaml
from avalanche.benchmarks import CLScenario
from tqdm import tqdm

from experiments.compare import choose_device, taken, warm_up
from experiments.options import flatten
from experiments.plan import Experiment, read_experiment, short
from experiments.run import Named, Run, check_writable
from experiments.search import Space, spaces
from lifelong_ens.errors import DamagedFileError, InputError, NonFiniteLossError
from lifelong_ens.store import write_bytes
from streams.benchmark import without_test

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial

OBJECTIVE = "mean accuracy over the tasks after the last of them, mean over seeds"
HEADER = "# Written by lifelong-ens tune, for: lifelong-ens compare --config FILE --seeds 5\n"
# what all studies in one file have in common; the rest is a strategy's own
SHARED = ("stream", "network", "fit", "num_tasks_used", "seeds")
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
            "options": [_words(row) for row in best[options].to_dict("records")],
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

    def run(self) -> Tuned:
        """Run the trials that are missing, strategy by strategy, then write ``tuned.yaml`` and ``trials.csv``.

        Raises:
            InputError: The stream has no validation images, or the study in the folder is another one.
            NonFiniteLossError: Every trial of a strategy met a loss that is no number.
        """
        check_writable(self.out)
        device = choose_device(self.device)
        storage = open_journal(self.out / "study.journal")
        benchmark = functools.cache(self._benchmark)
        studies = [
            StrategyStudy(self.experiment, strategy, spaces, self.num_tasks_used, storage, benchmark, device)
            for strategy, spaces in self.spaces.items()
        ]
        for seed in self.experiment.seeds:
            benchmark(seed)
        for study in studies:
            study.check(self.out / "study.journal")
        warm_up(device)
        for study in studies:
            study.run(self.trials)
        tuned = Tuned(_table([row for study in studies for row in study.rows()]))
        write_bytes(self.out / "trials.csv", tuned.trials.to_csv(index=False).encode())
        write_bytes(self.out / "tuned.yaml", (HEADER + self._yaml(studies)).encode())
        return tuned

    def _benchmark(self, seed: int) -> CLScenario:
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
        return yaml.safe_dump(_plain(content), sort_keys=False, width=100)


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
        _count("num_tasks_used", general["num_tasks_used"]),
        _count("trials", general["trials"]),
        Path(general["out"] or Path("results") / f"{short(experiment.stream.name)}-tune"),
        str(general["device"]),
    )


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
    benchmark: Callable[[int], CLScenario]
    device: torch.device

    @property
    def space(self) -> dict[str, Any]:
        """What makes trials comparable: all that they share, and where they search."""
        fixed = self.experiment.options(self.strategy)
        named = Named(
            self.strategy, {name: value for name, value in fixed.items() if name not in self.spaces}
        )
        return _plain(
            {
                "stream": self.experiment.stream.as_dict(),
                "network": self.experiment.network.as_dict(),
                "strategy": named.as_dict(),
                "fit": asdict(self.experiment.fit),
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

    def run(self, trials: int) -> None:
        """Run trials until so many are finished."""
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
                    outcome = self.evaluate(trial.params)
                except InputError as error:
                    raise InputError(f"{self.strategy} with {_words(trial.params)}: {error}") from error
                trial.set_user_attr("outcome", outcome)
                study.tell(trial, outcome["validation_accuracy"])

    def evaluate(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Train with these options and measure on validation images; a loss that is no number is worth 0."""
        outcome = {"validation_accuracy": 0.0, "flops": 0, "seconds": 0.0, "diverged": None}
        accuracies = []
        chosen = {**self.experiment.options(self.strategy), **options}
        for seed in self.experiment.seeds:
            cell, build = self.experiment.cell(self.strategy, seed, chosen)
            benchmark = self.benchmark(seed)
            with tempfile.TemporaryDirectory() as scratch:
                run = Run(
                    cell, benchmark, functools.partial(_build, build, benchmark, self.device), Path(scratch)
                )
                try:
                    accuracies.append(fmean(run.execute()["accuracy"][-1]))
                except NonFiniteLossError as error:
                    outcome["diverged"] = str(error)
            outcome["flops"] += round(run.costs.meter.flops)
            outcome["seconds"] += run.costs.meter.seconds
            if outcome["diverged"]:
                return outcome
        return outcome | {"validation_accuracy": fmean(accuracies)}

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


def open_journal(path: Path) -> JournalStorage:
    """Optuna's journal: JSON lines that are only ever appended to; a line that a kill cut off is dropped.

    Raises:
        DamagedFileError: The file is no journal.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    start = b'{"op_code":'
    if path.exists():
        whole, _, cut = (data := path.read_bytes()).rpartition(b"\n")
        if cut and (cut.startswith(start) or start.startswith(cut)):
            write_bytes(path, data[: len(data) - len(cut)])
        if not (whole or cut).startswith(start) and data:
            raise DamagedFileError(f"{path} is not a study of tune; move it away, or choose another --out.")
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except (ValueError, KeyError, TypeError) as error:
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


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The trials with their costs in the last columns."""
    costs = ("flops", "seconds")
    names = dict.fromkeys(name for row in rows for name in row)
    return pd.DataFrame(rows, columns=pd.Index([*(name for name in names if name not in costs), *costs]))


def _distribution(space: Space) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if space.choices:
        return CategoricalDistribution(space.choices)
    if isinstance(space.low, int):
        return IntDistribution(space.low, int(space.high), log=space.log)
    return FloatDistribution(space.low, space.high, log=space.log)


def _build(build: Callable[..., Any], benchmark: CLScenario, device: torch.device, seed: int) -> Any:
    return build(benchmark=benchmark, seed=seed, device=device)


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


def _count(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise InputError(f"--{name} {value}: expected a number of at least 1.")
    return number


def _words(options: Mapping[Any, Any]) -> str:
    """Options for people; those that a strategy does not have are left out."""
    known = {
        name: value for name, value in options.items() if not (isinstance(value, float) and pd.isna(value))
    }
    return ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in known.items()
    )


def _plain(value: Any) -> Any:
    """As JSON reads it back: lists, dictionaries, texts and numbers."""
    return json.loads(json.dumps(value, default=str))
