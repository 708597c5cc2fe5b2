"""From the record of a finished run to a folder that serves its tasks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import catalogue
from experiments.compare import strategy_builder, taken
from experiments.options import Owner, typed
from experiments.plan import short, strategy_owner
from lifelong_ens.errors import InputError, nearest
from lifelong_ens.networks.task import TaskNetwork
from lifelong_ens.report.records import check_record
from lifelong_ens.serving import ImageInput, TaskStore, export_network
from lifelong_ens.store import read_json, read_tensors, tensors_sha256
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy

# longer names of tasks, of all their classes, are not typed with pleasure
_LONGEST_NAME = 60


def find_record(place: Path, strategy: str | None = None, seed: int | None = None) -> Path:
    """The record of a finished run.

    Args:
        place: The record itself, or a folder that ``compare`` wrote.
        strategy: Whose run; may be None where the folder has those of one strategy.
        seed: The run's; None for the lowest there is.

    Raises:
        InputError: There is none, or several could be meant.
    """
    if not place.is_dir():
        return place
    records = [(path, read_json(path)) for path in sorted((place / "records").glob("*.json"))]
    runs = [(record["strategy"]["name"], record["seed"], path) for path, record in records]
    names = sorted({name for name, _, _ in runs})
    if not runs:
        raise InputError(f"{place} holds no records; give the --out of a compare that has finished.")
    if strategy is None and len(names) > 1:
        raise InputError(f"{place} holds runs of {', '.join(names)}; say which with --strategy.")
    wanted = strategy or names[0]
    found = [(s, path) for name, s, path in runs if name == wanted and seed in (None, s)]
    if not found:
        there = ", ".join(f"{name} seed {s}" for name, s, _ in runs)
        raise InputError(f"{place} has no such run; it has {there}.")
    least = min(s for s, _ in found)
    paths = [path for s, path in found if s == least]
    if len(paths) > 1:
        raise InputError(
            f"several runs are meant, which differ in options; give one: {', '.join(map(str, paths))}"
        )
    return paths[0]


def export_record(path: Path, out: Path, chosen: str | None = None) -> TaskStore:
    """Export the tasks of a finished run.

    Args:
        path: The run's record, ``OUT/records/NAME.json``; its state is in ``OUT/checkpoints/NAME``.
        out: Folder of the model.
        chosen: Names or numbers (from 1) of tasks, joined by commas; None for all.

    Raises:
        InputError: The run cannot be exported; the line says why.
        DamagedFileError: A file of the run cannot be used.
    """
    if not path.is_file():
        raise InputError(f"there is no record {path}; they are in the folder records of what compare wrote.")
    record = read_json(path)
    check_record(record, str(path))
    names = {kind: record[kind]["name"] for kind in ("stream", "strategy", "network")}
    if names["network"] == "given":
        raise InputError(
            f"{path} is of a run from Python, whose network it does not describe; "
            "use lifelong_ens.serving.export_network(strategy.network, ...) there."
        )
    benchmark, network, make_body, body = _rebuild(record, names)
    _restore(network, record, path)
    labels = getattr(benchmark, "class_names", None) or [
        list(map(str, range(n))) for n in network.classes_per_task
    ]
    tasks = dict(enumerate(task_names(labels, getattr(benchmark, "task_names", None))))
    if chosen is not None:
        tasks = {index: tasks[index] for index in _chosen(chosen, tasks)}
    options = {key: value for key, value in record["strategy"]["options"].items() if key != "weights"}
    about = {
        "method": {"name": names["strategy"], "options": options},
        "stream": names["stream"],
        "seed": record["seed"],
        "versions": record["versions"],
    }
    return export_network(
        network,
        out,
        body=body,
        tasks=tasks,
        labels=labels,
        about=about,
        metrics=_metrics(record, network.num_tasks),
        images=_images(benchmark),
        build_network=make_body,
    )


def task_names(labels: Sequence[Sequence[str]], given: Sequence[str] | None = None) -> list[str]:
    """The stream's names of tasks, or else their classes, where these can name files; else numbers from 1."""
    wanted = ["-".join(one) for one in labels] if given is None else given
    names = [one.replace("/", "_").lstrip(".") for one in wanted]
    if len(set(names)) == len(names) and all(0 < len(name) <= _LONGEST_NAME for name in names):
        return names
    width = len(str(len(labels)))
    return [f"{number:0{width}d}" for number in range(1, len(labels) + 1)]


def _rebuild(
    record: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[Any, TaskNetwork, Callable[[], torch.nn.Module], dict[str, Any]]:
    """The stream, the network without tasks, and the builder of its body with name and options."""
    functions = {kind: catalogue.load(catalogue.target_of(kind, name)) for kind, name in names.items()}
    given = {
        kind: _typed(Owner(short(names[kind]), functions[kind]), record[kind]["options"])
        for kind in ("stream", "network")
    }
    owner = strategy_owner(names["strategy"])
    options, own = _typed(owner, record["strategy"]["options"]), owner.own_types()
    fit = Fit(**record["fit"])
    fit = dataclasses.replace(fit, **{key: value for key, value in options.items() if key not in own})
    benchmark = functions["stream"](**taken(functions["stream"], {"seed": record["seed"]}), **given["stream"])
    build = strategy_builder(
        owner.function,
        functions["network"],
        given["network"],
        fit,
        **{key: value for key, value in options.items() if key in own},
    )
    with torch.random.fork_rng(devices=[]):
        strategy = build(benchmark=benchmark, seed=record["seed"], device=torch.device("cpu"))
    if not isinstance(strategy, Strategy):
        raise InputError(f"{names['strategy']} is not one of our strategies, which alone can be exported.")
    shape = tuple(benchmark.streams["train"][0].dataset[0][0].shape)
    body_options = {
        **taken(functions["network"], {"input_shape": shape}, {"input_shape"}),
        **given["network"],
    }
    body = {"name": names["network"], "options": {key: _plain(one) for key, one in body_options.items()}}
    return benchmark, strategy.network, functools.partial(functions["network"], **body_options), body


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _typed(owner: Owner, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a record as what they were before they were JSON."""
    kinds = owner.types()
    for name in options:
        if name not in kinds:
            raise InputError(f"{owner.name} has no option {name!r} in this version; {nearest(name, kinds)}")
    return {name: typed(name, value, kinds[name]) for name, value in options.items()}


def _restore(network: TaskNetwork, record: Mapping[str, Any], path: Path) -> None:
    """Give the network the state that the run ended with."""
    folder = path.parent.parent / "checkpoints" / path.stem
    states = sorted(folder.glob("task_*.json"))
    again = "the same compare command with --force runs it again and keeps its state"
    if not states:
        raise InputError(f"the state of this run is not in {folder} any more; {again}.")
    saved = read_json(states[-1])
    tensors = read_tensors(states[-1].with_suffix(".safetensors"), saved["sha256"])
    if tensors_sha256(tensors) != record["state_sha256"]:
        raise InputError(f"{folder} holds the state of another run than {path}; {again}.")
    network.regrow(saved["classes_per_task"]).load_state_dict(tensors)


def _chosen(given: str, tasks: Mapping[int, str]) -> list[int]:
    """Indices of tasks given by their names or numbers."""
    by_name = {str(index + 1): index for index in tasks} | {name: index for index, name in tasks.items()}
    wanted = [one.strip() for one in given.split(",") if one.strip()]
    for one in wanted:
        if one not in by_name:
            raise InputError(f"--tasks {one}: there is no such task; {nearest(one, by_name)}")
    return [by_name[one] for one in dict.fromkeys(wanted)]


def _metrics(record: Mapping[str, Any], num_tasks: int) -> list[dict[str, Any]]:
    """What was measured of each task after the last one."""
    last = record["tasks"][-1]["trained_task"]
    accuracy = record["accuracy"][last]
    measured: list[dict[str, Any]] = [{"accuracy": accuracy[task]} for task in range(num_tasks)]
    for one in record.get("uncertainty", []):
        if one["trained_task"] == last:
            measured[one["eval_task"]] |= {key: one[key] for key in ("nll", "ece", "brier")}
    return measured


def _images(benchmark: Any) -> ImageInput | None:
    """What image files become, where the stream's images are normalised alike in all tasks."""
    data = [getattr(one.dataset, "image_data", None) for one in benchmark.streams["test"]]
    scales = {None if one is None else (*one.mean.tolist(), *one.std.tolist()) for one in data}
    if len(scales) != 1 or data[0] is None:
        return None
    first = data[0]
    margin = getattr(benchmark, "crop_margin", None)
    return ImageInput(first.image_shape, tuple(first.mean.tolist()), tuple(first.std.tolist()), margin)
