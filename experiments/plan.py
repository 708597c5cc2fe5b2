"""From the words of the command line to the cells of a comparison."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments import catalogue
from experiments.compare import BuildStrategy, run_cells, strategy_builder
from experiments.options import Owner, make_fit, read_options
from experiments.run import Cell, Named
from lifelong_ens.errors import InputError
from lifelong_ens.report import Report
from lifelong_ens.training.fit import Fit

GENERAL = {
    "stream": "split_digits",
    "strategies": "finetune,batch_ensemble",
    "network": None,
    "seeds": 1,
    "out": None,
    "device": "auto",
    "task_inference": "none",
    "force": False,
}
FIT_OWNER = "training"
# up to 28x28 pixels, where an MLP is the network by default
SMALL_IMAGES = ("split_digits", "split_mnist", "permuted_mnist", "rotated_mnist", "split_fashion_mnist")


@dataclass(frozen=True)
class Plan:
    """A comparison that is ready to run."""

    cells: list[tuple[Cell, BuildStrategy]]
    make_benchmark: Callable[..., Any]
    out: Path
    device: str
    force: bool

    def run(self) -> Report:
        """Run what has no record yet and report on everything."""
        return run_cells(self.cells, self.make_benchmark, out=self.out, device=self.device, force=self.force)


def plan_comparison(parsed: Mapping[str, Any], rest: Sequence[str]) -> Plan:
    """Everything checked that can be checked before anything is trained.

    Args:
        parsed: General options from the command line, None where not given, and ``config``.
        rest: The other arguments, options of stream, network, strategies and training.

    Raises:
        InputError: Something named or given cannot be used.
    """
    config = _read_config(parsed.get("config"))
    general = {name: _first(parsed.get(name), config.pop(name, None), GENERAL[name]) for name in GENERAL}
    stream_name = str(general["stream"])
    strategy_names = _names(general["strategies"])
    stream = catalogue.load(catalogue.target_of("stream", stream_name))
    builders = {name: catalogue.load(catalogue.target_of("strategy", name)) for name in strategy_names}
    network_name = str(general["network"] or ("mlp" if stream_name in SMALL_IMAGES else "lenet5"))
    network = catalogue.load(catalogue.target_of("network", network_name))
    owners = [
        Owner(_short(stream_name), stream, only_dotted=frozenset({"seed"})),
        Owner(_short(network_name), network),
        *(Owner(_short(name), builder) for name, builder in builders.items()),
        Owner(FIT_OWNER, Fit),
    ]
    options = read_options(owners, rest, config)
    stream_options, network_options = options[owners[0].name], options[owners[1].name]
    fit = make_fit(options[FIT_OWNER])
    inference = _inference(general["task_inference"])
    cells = [
        (
            Cell(
                Named(stream_name, stream_options),
                Named(name, options[_short(name)]),
                Named(network_name, network_options),
                asdict(fit),
                seed,
                inference,
            ),
            strategy_builder(builder, network, network_options, fit, **options[_short(name)]),
        )
        for seed in _seeds(general["seeds"])
        for name, builder in builders.items()
    ]
    out = Path(general["out"] or Path("results") / _short(stream_name))
    make_benchmark = functools.partial(stream, **stream_options)
    return Plan(cells, make_benchmark, out, str(general["device"]), bool(general["force"]))


def _first(*values: Any) -> Any:
    """The first value that was given."""
    return next((value for value in values if value is not None), None)


def _read_config(path: Path | None) -> dict[str, Any]:
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


def _names(value: Any) -> list[str]:
    names = (
        [name.strip() for name in value.split(",")]
        if isinstance(value, str)
        else [str(name) for name in value]
    )
    names = [name for name in dict.fromkeys(names) if name]
    if not names:
        raise InputError("--strategies names no strategy.")
    return names


def _inference(value: Any) -> Any:
    rules = ("none", "entropy", "max_probability")
    if value not in rules:
        raise InputError(f"--task_inference {value}: expected one of {', '.join(rules)}.")
    return value


def _seeds(value: Any) -> list[int]:
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


def _short(name: str) -> str:
    """The name that options of a module:function are given under."""
    return name.rpartition(":")[2]
