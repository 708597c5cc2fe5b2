"""From the words of ``lifelong-ens plan`` to what strategies cost at numbers of tasks, and where they break."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments import catalogue
from experiments.compare import BuildStrategy, choose_device, strategy_builder
from experiments.machines import EFFICIENCY, machine
from experiments.options import Owner, check_required, make_fit, of_owner, read_options, typed, whole
from experiments.paper import Cost, Growth, TaskShape, growth, measured_speed, plain_parameters
from experiments.plan import FIT_OWNER, SMALL_IMAGES, names_of, short, strategy_owner
from experiments.run import device_name
from lifelong_ens.errors import InputError
from lifelong_ens.report.headline import quantity, with_ratio
from lifelong_ens.training.fit import Fit
from strategies.baselines import finetune

# classes of a task where the stream is built with its defaults, image shape, training images of a class
STREAMS: dict[str, tuple[int, tuple[int, int, int], float]] = {
    "split_digits": (2, (1, 8, 8), 134.7),
    "split_mnist": (2, (1, 28, 28), 6000),
    "permuted_mnist": (10, (1, 28, 28), 6000),
    "rotated_mnist": (10, (1, 28, 28), 6000),
    "split_fashion_mnist": (2, (1, 28, 28), 6000),
    "split_cifar10": (2, (3, 32, 32), 5000),
    "split_cifar100": (10, (3, 32, 32), 500),
    "split_tiny_imagenet": (20, (3, 64, 64), 500),
    "split_imagenet": (10, (3, 224, 224), 1281.167),
}
SHAPE = ("classes_per_task", "image_size", "images_per_task")
DAY = 86_400


@dataclass(frozen=True)
class Computer:
    """What trains.

    Attributes:
        name: For the head of a column.
        about: A line on it.
        memory_bytes: For all that is there while a task is trained.
        speed: FLOPs per second in training, of a strategy that is built.
    """

    name: str
    about: str
    memory_bytes: float
    speed: Callable[[BuildStrategy], float]


@dataclass(frozen=True)
class Outlook:
    """What is printed and written.

    Attributes:
        about: A line each on tasks, network and machine.
        costs: A row for every strategy and number of tasks.
        breaks: A row for every strategy: the first number of tasks that is too many; None where none is.
        limits: What is too much, in words, by the column of ``breaks``.
        machine: What trains, in a word or two.
        notes: How it was counted, and why strategies are missing.
    """

    about: list[str]
    costs: pd.DataFrame
    breaks: pd.DataFrame
    limits: Mapping[str, str]
    machine: str
    notes: list[str]

    def cost_texts(self) -> pd.DataFrame:
        """The costs as they are printed."""
        rows = [
            {
                "strategy": row["strategy"],
                "tasks": f"{row['tasks']:,}",
                "parameters": with_ratio(_quantity(row["parameters"]), [row["parameters_ratio"]]),
                "stored": _quantity(row["bytes"], "B"),
                "memory": _quantity(row["memory_bytes"], "B"),
                "FLOPs an image": _quantity(row["flops_forward"]),
                "training FLOPs": _quantity(row["flops_training"]),
                f"hours on {self.machine}": _hours(row["seconds"]),
            }
            for row in self.costs.to_dict("records")
        ]
        return pd.DataFrame(rows)

    def break_texts(self) -> pd.DataFrame:
        """The breaks as they are printed."""
        rows = [
            {
                "too much for": row["strategy"],
                **{text: _tasks(row[column]) for column, text in self.limits.items()},
            }
            for row in self.breaks.to_dict("records")
        ]
        return pd.DataFrame(rows)

    def write(self, out: Path) -> None:
        """Exact numbers, as CSV or JSON by the file's name: the costs, beside each the breaks of its strategy."""
        table = self.costs.merge(self.breaks, on="strategy")
        if out.suffix == ".csv":
            table.to_csv(out, index=False)
        else:
            table.to_json(out, orient="records", indent=1)


def outlook(parsed: Mapping[str, Any], rest: Sequence[str]) -> Outlook:
    """Plan what was asked for.

    Args:
        parsed: What ``experiments.commands.plan`` describes.
        rest: Options of the network, of strategies and of training.

    Raises:
        InputError: Something named or given cannot be used, or nothing is known of any of the strategies.
    """
    counts = [whole("tasks", one) for one in names_of("tasks", parsed["tasks"])]
    days, disk_gb = (_above_zero(name, parsed[name]) for name in ("max_days", "disk_gb"))
    task = task_shape(parsed)
    stream, named = parsed["stream"], parsed["network"]
    network_name = named or ("mlp" if stream in SMALL_IMAGES else "lenet5")
    network = catalogue.load(catalogue.target_of("network", network_name))
    owners = {name: strategy_owner(name) for name in names_of("strategies", parsed["strategies"])}
    network_owner, fit_owner = Owner(short(network_name), network), Owner(FIT_OWNER, Fit)
    every = [network_owner, *owners.values(), fit_owner]
    given = read_options(every, rest, {}, also=parsed)
    check_required(every, given)
    fit, options = make_fit(of_owner(fit_owner, given)), of_owner(network_owner, given)
    computer = _computer(parsed, fit, task)
    grown: dict[str, tuple[Growth, float]] = {}
    problems = []
    for name, owner in owners.items():
        own = of_owner(owner, given)
        training = {one: own.pop(one) for one in [*own] if one not in owner.own_types()}
        its_fit = dataclasses.replace(fit, **training)
        builder = functools.partial(strategy_builder, owner.function, network, options, **own)
        try:
            grown[name] = growth(builder(_on_paper(its_fit)), task), computer.speed(builder(its_fit))
        except InputError as error:
            problems.append(f"– {name}: {error}")
    if not grown:
        raise InputError("; ".join(problems).removeprefix("– "))
    about = [
        f"tasks: {task.classes} classes and {task.images:,} training images each, "
        f"of {'x'.join(map(str, task.image_shape))}",
        f"network: {network_name}; training: {fit.epochs} epochs a task, batches of {fit.batch_size}",
        computer.about,
    ]
    plain = plain_parameters(strategy_builder(finetune, network, options, fit), task, counts)
    costs = [
        {"strategy": name, "tasks": count, **_costs(one.at(count), plain[count], speed)}
        for name, (one, speed) in grown.items()
        for count in counts
    ]
    most = computer.memory_bytes, days * DAY, disk_gb * 1e9
    breaks = [{"strategy": name, **_breaks(one, speed, *most)} for name, (one, speed) in grown.items()]
    limits = {
        "memory_breaks_at": f"{quantity([computer.memory_bytes], 'B')} of memory",
        "time_breaks_at": f"{days:g} days",
        "disk_breaks_at": f"{quantity([disk_gb * 1e9], 'B')} of disk",
    }
    return Outlook(
        about,
        pd.DataFrame(costs),
        pd.DataFrame(breaks, dtype=object),
        limits,
        computer.name,
        [*problems, *_notes(fit)],
    )


def task_shape(parsed: Mapping[str, Any]) -> TaskShape:
    """What a task of the named stream is like, as far as it is not given itself.

    Raises:
        InputError: There is no such stream, or it has the shape of its files and not all is given.
    """
    name = parsed["stream"]
    catalogue.target_of("stream", name)
    given = {one: None if parsed[one] is None else whole(one, parsed[one]) for one in SHAPE}
    if name not in STREAMS and None in given.values():
        options = ", ".join(f"--{one} N" for one in SHAPE)
        raise InputError(f"what the tasks of {name} are like depends on its files: give {options}.")
    classes, (channels, size, _), images = STREAMS.get(name, (1, (3, 1, 1), 1))
    classes, size = given["classes_per_task"] or classes, given["image_size"] or size
    return TaskShape(classes, (channels, size, size), given["images_per_task"] or round(classes * images))


def _above_zero(name: str, value: Any) -> float:
    number = typed(name, value, float)
    if not number > 0:
        raise InputError(f"--{name} is above 0, not {value}.")
    return number


def _on_paper(fit: Fit) -> Fit:
    """The same training, as far as it can be followed without values; FLOPs and sizes do not depend on the rest."""
    return dataclasses.replace(fit, augment="none", amp=False, compile=False, patience=None)


def _computer(parsed: Mapping[str, Any], fit: Fit, task: TaskShape) -> Computer:
    """The machine that was named, or this one."""
    if parsed["measure"]:
        if parsed["machine"] is not None or parsed["efficiency"] is not None:
            raise InputError("--measure is of the machine here: leave out --machine and --efficiency.")
        device = choose_device("auto")
        memory = (
            torch.cuda.get_device_properties(device).total_memory
            if device.type == "cuda"
            else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        )
        about = f"machine: {device_name(device)} here, {quantity([memory], 'B')}; each strategy's own steps measured"
        return Computer("this machine", about, memory, lambda build: measured_speed(build, task, device))
    named = machine(parsed["machine"] or "a100")
    share = EFFICIENCY if parsed["efficiency"] is None else _above_zero("efficiency", parsed["efficiency"])
    peak = named.peak(fit.amp)
    text = f"{named.name}, {share:g} of a peak of {quantity([peak], 'FLOP/s')}"
    about = f"machine: {text} ({'amp' if fit.amp else 'float32'}), {quantity([named.memory_bytes], 'B')}"
    return Computer(named.name, about, named.memory_bytes, lambda _: share * peak)


def _costs(cost: Cost, plain: int, speed: float) -> dict[str, float]:
    return {
        "parameters": cost.parameters,
        "parameters_ratio": cost.parameters / plain,
        "bytes": cost.bytes,
        "disk_bytes": cost.disk_bytes,
        "memory_bytes": cost.memory_bytes,
        "flops_forward": cost.flops_forward,
        "flops_training": cost.flops_training,
        "seconds": cost.flops_training / speed,
    }


def _breaks(one: Growth, speed: float, memory: float, seconds: float, disk: float) -> dict[str, int | None]:
    """The first numbers of tasks that are too many."""
    return {
        "memory_breaks_at": one.first_beyond(memory, lambda cost: cost.memory_bytes),
        "time_breaks_at": one.first_beyond(seconds * speed, lambda cost: cost.flops_training),
        "disk_breaks_at": one.first_beyond(disk, lambda cost: cost.disk_bytes),
    }


def _notes(fit: Fit) -> list[str]:
    notes = [
        "parameters: all learned numbers, heads, norms and biases too; beside them the ratio to one plain network with "
        "as many heads.",
        "stored: what the ledger holds after the last task, the optimizer's state too. memory: tensors while the last "
        "task is trained, in float32.",
        "time: training FLOPs at this speed. Neither what is no product or convolution, nor loading and evaluation, is "
        "counted.",
    ]
    return notes + (
        ["--patience may stop training early: FLOPs and time are the most."] if fit.patience else []
    )


def _quantity(value: float, unit: str = "") -> str:
    # beyond the prefixes there are
    return quantity([value], unit) if value < 1e21 else f"{value:.3g} {unit}".strip()


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f}" if 100 <= hours < 1e12 else f"{hours:.3g}"


def _tasks(count: int | None) -> str:
    return "–" if count is None else f"{count:,.0f} tasks"
