"""The page of strategies on streams of tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lifelong_ens.report.page import figures
from lifelong_ens.report.page.command import compare_commands
from lifelong_ens.report.page.measures import (
    Measure,
    count,
    percent,
    ratio,
    seconds,
    size,
    table_block,
    three,
)
from lifelong_ens.report.page.model import Block, Comparison, Figure, Key, Series, series_of
from lifelong_ens.report.page.shared import (
    Source,
    named,
    options_block,
    samples,
    states,
    training,
    where,
)
from lifelong_ens.report.records import flat, newest_of_each_run
from lifelong_ens.report.report import Report
from lifelong_ens.report.tables import VANILLA

_Pandas = Any
_Record = Mapping[str, Any]

HEADLINE = (
    Measure(
        "average_accuracy",
        "accuracy, %",
        "mean over all tasks after the last one",
        "up",
        percent,
        bounds=(0, 1),
    ),
    Measure(
        "forgetting",
        "forgetting, points",
        "best earlier accuracy of past tasks minus the final one",
        "down",
        percent,
        bounds=(-1, 1),
    ),
    Measure(
        "ratio_bytes",
        "memory",
        f"of what is stored after the last task, relative to {VANILLA}",
        "down",
        ratio,
        True,
        ("bytes", size),
    ),
    Measure(
        "ratio_flops_forward",
        "computation, answer",
        f"forward FLOPs of one image, relative to {VANILLA}",
        "down",
        ratio,
        True,
        ("flops_forward", count),
    ),
    Measure(
        "ratio_flops_training",
        "computation, training",
        f"FLOPs of all training, relative to {VANILLA}",
        "down",
        ratio,
        True,
        ("flops_training", count),
    ),
    Measure("ece", "ECE", "expected calibration error over all tasks, 15 bins", "down", three, bounds=(0, 1)),
    Measure(
        "nll", "NLL, nats", "negative log-likelihood over all tasks", "down", three, bounds=(0, math.inf)
    ),
    Measure(
        "class_incremental_accuracy",
        "task not told, %",
        "accuracy where the task is guessed",
        "up",
        percent,
        bounds=(0, 1),
    ),
)
COSTS = (
    Measure("seconds_training", "training", "time of all training", "down", seconds, bounds=(0, math.inf)),
    Measure("seconds_evaluation", "evaluation", "time of all evaluation", "", seconds, bounds=(0, math.inf)),
    Measure(
        "flops_training",
        "training FLOPs",
        "of the whole stream; 1 multiply-add is 2 FLOPs",
        "down",
        count,
        True,
    ),
    Measure(
        "flops_forward", "forward FLOPs", "of one image on the path of the last task", "down", count, True
    ),
    Measure("parameters", "parameters", "stored after the last task", "down", count, True),
    Measure("bytes", "memory", "of these at their true dtypes", "down", size, True),
    Measure("disk_bytes", "on disk", "written for the model after the last task", "down", size, True),
    Measure("saved_bytes", "kept for backward", "peak over all training steps", "down", size, True),
)

FRONTS = {
    "ratio_bytes": "memory",
    "ratio_flops_forward": "computation of an answer",
    "ratio_flops_training": "computation of training",
}

_IMAGES = "Images that lie in a folder need --root DIR, where it is not among the options."
_MEMORY_TEXT = "Bytes of what is stored after each task. Every panel has its own scale."


def comparisons(sources: Sequence[Source]) -> list[Comparison]:
    """One for each stream and setting."""
    records = [
        record | ({"out": source.out.name} if len(sources) > 1 else {})
        for source in sources
        for record in source.records
    ]
    report = Report.from_records(records)
    kept = newest_of_each_run(records)  # in the order of the rows of runs
    found = []
    for i, ((stream, setting), title) in enumerate(report.labels.items()):
        mine = (report.runs["stream"] == stream) & (report.runs["setting"] == setting)
        own = [kept[row] for row in np.flatnonzero(mine.to_numpy())]
        tables = {
            name: _of(getattr(report, name), stream, setting)
            for name in ("runs", "accuracy", "costs", "tasks", "reliability")
        }
        found.append(_comparison(title, own, tables, sources, f"c{i}"))
    return found


def _of(table: _Pandas, stream: str, setting: str) -> _Pandas:
    return table[(table["stream"] == stream) & (table["setting"] == setting)]


def _comparison(
    title: str, records: list[_Record], tables: dict[str, _Pandas], sources: Sequence[Source], salt: str
) -> Comparison:
    tables = {name: table.rename(columns={"strategy": "name"}) for name, table in tables.items()}
    runs, first = tables["runs"], records[0]
    series = series_of(list(runs["name"]))
    num_tasks = int(first["stream"]["num_tasks"])
    classes = first["stream"].get("classes") or [[] for _ in range(num_tasks)]
    folder = next(source.out for source in sources if _is_in(first, source))
    found, note = samples(sources, first["setting"], [_classes(task) for task in classes])
    commands = compare_commands(records, str(folder))
    blocks = [
        table_block("Results", runs, series, HEADLINE),
        _accuracy(tables, series, num_tasks, salt),
        _matrices(tables["accuracy"], series, num_tasks, salt),
        _memory(tables["costs"], series, num_tasks, salt),
        _reliability(tables["reliability"], series, salt),
        table_block("Time and computation", runs, series, COSTS),
        options_block(records, list(runs["name"]), "strategy", _shared(first), series),
    ]
    return Comparison(
        title,
        f"{num_tasks} tasks learnt one after the other by {len(series)} strategies, {len(records)} runs.",
        "strategies",
        list(series.values()),
        [
            ("stream", named(first["stream"])),
            ("tasks", f"{num_tasks}, of {_numbers([len(task) for task in classes])} classes"),
            ("network", named(first["network"])),
            ("training", training(first["fit"])),
            *where(records),
        ],
        found,
        note,
        blocks,
        commands,
        _IMAGES
        if commands
        else "These runs were started from Python, with experiments.compare.compare(...).",
        states(sources, first["setting"]),
    )


def _is_in(record: _Record, source: Source) -> bool:
    return record.get("out", source.out.name) == source.out.name


def _classes(task: Sequence[int]) -> str:
    shown = ", ".join(map(str, task[:12]))
    return f"classes {shown}{', …' if len(task) > 12 else ''}"


def _numbers(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _shared(record: _Record) -> dict[str, Any]:
    return {
        "stream": record["stream"]["name"],
        **flat(record["stream"].get("options") or {}, "stream."),
        "network": record["network"]["name"],
        **flat(record["network"].get("options") or {}, "network."),
        **flat(record["fit"], "training."),
    }


def _accuracy(tables: dict[str, _Pandas], series: Mapping[str, Series], num_tasks: int, salt: str) -> Block:
    final = 100 * tables["runs"].groupby("name", sort=False)["average_accuracy"].mean()
    words = ", ".join(f"{name} {value:.1f} %" for name, value in final.items())
    picture = figures.curves(tables["tasks"], series, num_tasks, f"{salt}-curves")
    alt = (
        f"Average accuracy over the tasks seen so far, after each of {num_tasks} tasks. At the end: {words}."
    )
    caption = (
        "Average accuracy over the tasks seen so far: mean over seeds, with bands of 95 % intervals. A dotted line is "
        "a strategy that has all tasks at once."
    )
    fronts = _fronts(tables["runs"], series, salt)
    missing = "" if fronts else f"{VANILLA} did not run, so that nothing can be said relative to it."
    return Block(
        "Accuracy, and what it costs", figures=[Figure(picture, alt, caption), *fronts], missing=missing
    )


def _fronts(runs: _Pandas, series: Mapping[str, Series], salt: str) -> list[Figure]:
    points = runs.assign(y=100 * runs["average_accuracy"])
    found = []
    for column, words in FRONTS.items():
        if runs[column].isna().all():
            continue
        own = points.assign(x=runs[column])
        middle = own.groupby("name", sort=False)[["x", "y"]].mean().dropna()
        said = ", ".join(f"{name} {x:.2f}x and {y:.1f} %" for name, (x, y) in middle.iterrows())
        names = f"{words}, ratio to {VANILLA}", "average accuracy, %"
        picture = figures.front(own, series, names, False, f"{salt}-{column}")
        caption = f"Accuracy against {words}: up and to the left is better. The line joins what nothing beats in both."
        found.append(Figure(picture, f"Accuracy against {words}: {said}.", caption))
    return found


def _matrices(accuracy: _Pandas, series: Mapping[str, Series], num_tasks: int, salt: str) -> Block:
    means = 100 * accuracy.groupby(["name", "trained_task", "eval_task"], sort=False)["accuracy"].mean()
    lowest = min((math.floor(value) for value in means), default=0)
    found = []
    for one in series.values():
        cells = np.full((num_tasks, num_tasks), np.nan)
        if one.name in means.index.get_level_values("name"):
            for (trained, evaluated), value in means[one.name].items():
                cells[trained, evaluated] = value
        alt = f"Accuracy matrix of {one.name}. {_matrix_words(cells)}"
        found.append(Figure(figures.matrix(cells, lowest, f"{salt}-m{one.index}"), alt, one.name, one))
    text = (
        f"Accuracy on each task (across) after training each task (down), from {lowest} % (dark) to 100 % (light), "
        "mean over seeds. Empty cells were not measured."
    )
    return Block("Accuracy matrices", text, found, small=True)


def _matrix_words(cells: np.ndarray) -> str:
    last = ", ".join("–" if math.isnan(value) else f"{value:.0f}" for value in cells[-1])
    just = ", ".join("–" if math.isnan(value) else f"{value:.0f}" for value in np.diag(cells))
    return f"In percent, when just learnt: {just}; after the last task: {last}."


def _memory(costs: _Pandas, series: Mapping[str, Series], num_tasks: int, salt: str) -> Block:
    stored = costs[(costs["component"] != "optimizer") & (costs["bytes"] > 0)]
    sizes = stored.groupby("component")["bytes"].sum().sort_values(ascending=False)
    colours = figures.colours_of(list(sizes.index))
    found = []
    for one in series.values():
        own = stored[stored["name"] == one.name]
        if own.empty:
            continue
        last = own[own["trained_task"] == own["trained_task"].max()].groupby("component")["bytes"].mean()
        words = ", ".join(
            f"{name} {size(value)}" for name, value in last.sort_values(ascending=False).items()
        )
        alt = f"Memory of {one.name} after each task by component; after the last one {words}."
        picture = figures.memory(own, colours, num_tasks, f"{salt}-b{one.index}")
        found.append(Figure(picture, alt, f"{one.name}: {size(float(last.sum()))}", one))
    keys = [Key(colour, name) for name, colour in colours.items()]
    return Block(
        "Memory by component",
        _MEMORY_TEXT,
        found,
        small=True,
        keys=keys,
    )


def _reliability(bins: _Pandas, series: Mapping[str, Series], salt: str) -> Block:
    found = []
    for one in series.values():
        own = bins[bins["name"] == one.name]
        if own.empty or not own["count"].sum():
            continue
        alt = figures.reliability_words(one.name, own)
        found.append(
            Figure(figures.reliability(own, one.style["color"], f"{salt}-r{one.index}"), alt, one.name, one)
        )
    text = figures.RELIABILITY_TEXT.format("the test images of all tasks after the last one")
    missing = "" if found else "These records were written before reliability was part of them."
    return Block("Reliability", text if found else "", found, small=True, missing=missing)
