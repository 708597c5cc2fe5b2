"""From the words of the command line to the cells of a comparison."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments import catalogue
from experiments.compare import BuildStrategy, run_cells, strategy_builder
from experiments.engines import OPTIONS as ENGINE
from experiments.engines import Engine, make_engine
from experiments.logs import check_loggers
from experiments.options import Owner, check_required, make_fit, of_owner, read_options, typed
from experiments.run import Cell, Named
from lifelong_ens.errors import InputError
from lifelong_ens.report import Report
from lifelong_ens.report.records import check_tuning
from lifelong_ens.training.fit import Fit

log = logging.getLogger(__name__)

GENERAL = {
    "stream": "split_digits",
    "strategies": "finetune,batch_ensemble",
    "network": None,
    "seeds": 1,
    "out": None,
    "device": "auto",
}
COMPARE = {
    "task_inference": "none",
    "evaluate": "new",
    "force": False,
    "tuning": None,
    "log_to": None,
    "devices": None,
    **dict.fromkeys(ENGINE),
}
# options of measuring, and what each may be
MEASURED = {"task_inference": ("none", "entropy", "max_probability"), "evaluate": ("new", "all")}
TUNE = {"trials": 20, "num_tasks_used": 3, "search": None}
FIT_OWNER = "training"
# options of our streams of files that change how images are read, not what they are
READING = ("workers", "cache_gb")
# up to 28x28 pixels, where an MLP is the network by default
SMALL_IMAGES = ("split_digits", "split_mnist", "permuted_mnist", "rotated_mnist", "split_fashion_mnist")


@dataclass(frozen=True)
class Experiment:
    """What was named, loaded, with its options.

    Attributes:
        general: What belongs to the command itself, defaults filled in.
        given: All other options as they were given, name to value.
        stream: The stream and its options, but for those of reading it.
        make_benchmark: Its builder with all its options; the seed is missing.
        network: The network and its options.
        make_network: Its builder.
        strategies: Each strategy's owner of options, by the strategy's name.
        fit: The training that all strategies share.
    """

    general: Mapping[str, Any]
    given: Mapping[str, Any]
    stream: Named
    make_benchmark: Callable[..., Any]
    network: Named
    make_network: Callable[..., Any]
    strategies: Mapping[str, Owner]
    fit: Fit

    @property
    def seeds(self) -> list[int]:
        """One run of every strategy for each."""
        return parse_seeds(self.general["seeds"])

    def options(self, strategy: str) -> dict[str, Any]:
        """What a strategy was given for itself, options of training included."""
        return of_owner(self.strategies[strategy], self.given)

    def cell(
        self, strategy: str, seed: int, options: Mapping[str, Any], **more: Any
    ) -> tuple[Cell, BuildStrategy]:
        """One run of a strategy with options of its own, and its builder."""
        owner = self.strategies[strategy]
        names = owner.own_types()
        own = {name: value for name, value in options.items() if name in names}
        training = {name: value for name, value in options.items() if name not in names}
        fit = dataclasses.replace(self.fit, **training)
        build = strategy_builder(owner.function, self.make_network, self.network.options, fit, **own)
        named = Named(strategy, options)
        return Cell(self.stream, named, self.network, self.fit.as_dict(), seed, **more), build


@dataclass(frozen=True)
class Plan:
    """A comparison that is ready to run."""

    cells: list[tuple[Cell, BuildStrategy]]
    make_benchmark: Callable[..., Any]
    out: Path
    device: str
    force: bool
    log_to: tuple[str, ...] = ()
    devices: int | None = None
    engine: Engine | None = None

    def run(self) -> Report:
        """Run what has no record yet and report on everything."""
        return run_cells(
            self.cells,
            self.make_benchmark,
            out=self.out,
            device=self.device,
            force=self.force,
            log_to=self.log_to,
            devices=self.devices,
            engine=self.engine,
        )


def plan_comparison(parsed: Mapping[str, Any], rest: Sequence[str]) -> Plan:
    """Everything checked that can be checked before anything is trained.

    Args:
        parsed: General options from the command line, None where not given, and ``config``.
        rest: The other arguments, options of stream, network, strategies and training.

    Raises:
        InputError: Something named or given cannot be used.
    """
    experiment = read_experiment(parsed, rest)
    general = experiment.general
    measured = {name: _one_of(name, general[name], values) for name, values in MEASURED.items()}
    tuning = _tuning(experiment, general["tuning"])
    devices = None if general["devices"] is None else typed("devices", general["devices"], int)
    cells = [
        experiment.cell(name, seed, experiment.options(name), **measured, tuning=tuning.get(name))
        for seed in experiment.seeds
        for name in experiment.strategies
    ]
    out = Path(general["out"] or Path("results") / short(experiment.stream.name))
    log_to = general["log_to"] or ()
    names = names_of("log_to", ",".join([log_to] if isinstance(log_to, str) else log_to)) if log_to else ()
    return Plan(
        cells,
        experiment.make_benchmark,
        out,
        str(general["device"]),
        bool(general["force"]),
        check_loggers(names),
        devices,
        make_engine(general),
    )


def read_experiment(parsed: Mapping[str, Any], rest: Sequence[str]) -> Experiment:
    """What ``compare`` and ``tune`` have in common; a YAML file may hold options of both.

    Raises:
        InputError: Something named or given cannot be used.
    """
    config = read_config(parsed.get("config"))
    known = {**GENERAL, **COMPARE, **TUNE}
    general = {name: first_given(parsed.get(name), config.pop(name, None), known[name]) for name in known}
    stream_name, names = str(general["stream"]), names_of("strategies", general["strategies"])
    stream = catalogue.load(catalogue.target_of("stream", stream_name))
    network_name = str(general["network"] or ("mlp" if stream_name in SMALL_IMAGES else "lenet5"))
    network = catalogue.load(catalogue.target_of("network", network_name))
    strategies = {name: strategy_owner(name) for name in names}
    stream_owner = Owner(short(stream_name), stream, only_dotted=frozenset({"seed"}))
    network_owner, fit_owner = Owner(short(network_name), network), Owner(FIT_OWNER, Fit)
    owners = [stream_owner, network_owner, *strategies.values(), fit_owner]
    given = read_options(owners, rest, config, also=parsed)
    check_required(owners, given)
    stream_options = of_owner(stream_owner, given)
    return Experiment(
        general,
        given,
        Named(stream_name, _without_reading(stream_name, stream_options)),
        functools.partial(stream, **stream_options),
        Named(network_name, of_owner(network_owner, given)),
        network,
        strategies,
        make_fit(of_owner(fit_owner, given)),
    )


def _without_reading(stream_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What says which stream it is: a run goes on, and compares, whatever number of threads decodes."""
    ours = stream_name in catalogue.KINDS["stream"]
    return {name: value for name, value in options.items() if not (ours and name in READING)}


def strategy_owner(name: str) -> Owner:
    """A strategy's builder as the owner of its options."""
    return Owner(short(name), catalogue.load(catalogue.target_of("strategy", name)), beside=Fit)


def _tuning(experiment: Experiment, tuning: Any) -> dict[str, Mapping[str, Any]]:
    """The protocols in a YAML file that ``tune`` wrote, of the strategies that still have the tuned values."""
    if tuning is None:
        return {}
    if not isinstance(tuning, Mapping):
        raise InputError("the config's `tuning` is not what tune writes: take it out, or tune again.")
    kept = {}
    for name in experiment.strategies:
        if name not in tuning:
            continue
        check_tuning(tuning[name], f"the config's `tuning.{name}`")
        if tuning[name]["best"].items() <= experiment.options(name).items():
            kept[name] = tuning[name]
        else:
            log.warning("%s: its options are not the tuned ones; its records do not count as tuned", name)
    return kept


def first_given(*values: Any) -> Any:
    """The first value that was given."""
    return next((value for value in values if value is not None), None)


def read_config(path: Path | None) -> dict[str, Any]:
    """What a YAML file sets; nothing where there is no file.

    Raises:
        InputError: It cannot be read.
    """
    if path is None:
        return {}
    try:
        config = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"no config file {path}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a YAML mapping of option names to values.")
    return {str(name): value for name, value in config.items()}


def names_of(option: str, value: Any) -> list[str]:
    """A list, or texts joined by commas, each once.

    Raises:
        InputError: There is none.
    """
    names = (
        [name.strip() for name in value.split(",")]
        if isinstance(value, str)
        else [str(name) for name in value]
    )
    names = [name for name in dict.fromkeys(names) if name]
    if not names:
        raise InputError(f"--{option} names nothing.")
    return names


def _one_of(option: str, value: Any, values: Sequence[str]) -> Any:
    if value not in values:
        raise InputError(f"--{option} {value}: expected one of {', '.join(values)}.")
    return value


def parse_seeds(value: Any) -> list[int]:
    """A count, ``3``, or a list, ``0,3,7``."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"--seeds {text}: expected a count such as 3, or a list such as 0,3,7.") from error
    is_list = "," in text or isinstance(value, list)
    if not numbers or min(numbers) < 0 or (not is_list and numbers[0] < 1):
        raise InputError(f"--seeds {text}: expected at least one seed, none below 0.")
    return numbers if is_list else list(range(numbers[0]))


def short(name: str) -> str:
    """The name that options of a module:function are given under."""
    return name.rpartition(":")[2]
