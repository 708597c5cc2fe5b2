"""Records -> the four tidy tables of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lifelong_ens.metrics import continual
from lifelong_ens.report import columns
from lifelong_ens.report.records import RELIABILITY, flat, newest_of_each_run, own_options

VANILLA = "finetune"
"""The strategy whose costs are the 1.0 of every ratio: one network, one head per task, nothing else."""

_MAX_SUFFIX = 60

_Record = Mapping[str, Any]


class Tables(NamedTuple):
    """The tables, every row of which starts with stream, strategy and seed, and a label per setting."""

    runs: pd.DataFrame
    accuracy: pd.DataFrame
    costs: pd.DataFrame
    tasks: pd.DataFrame
    reliability: pd.DataFrame
    labels: dict[tuple[str, str], str]


def build_tables(records: Iterable[_Record]) -> Tables:
    """The tables of checked records, runs in the order in which they come."""
    kept = newest_of_each_run(records)
    labels = strategy_labels(kept)
    keys = [
        {
            "stream": record["stream"]["name"],
            "strategy": label,
            "seed": record["seed"],
            "setting": record["setting"],
        }
        for record, label in zip(kept, labels, strict=True)
    ]
    pairs = list(zip(keys, kept, strict=True))
    runs = _table([key | _run(record) for key, record in pairs], columns.RUNS)
    vanilla: dict[tuple[Any, ...], int] = {}
    for i, (key, record) in enumerate(pairs):
        if _is_vanilla(record):
            vanilla.setdefault(_group(key), i)
            vanilla.setdefault((*_group(key), record.get("out")), i)
    # the vanilla network of the same folder, if it has one
    of_each = [
        vanilla.get((*_group(key), record.get("out")), vanilla.get(_group(key))) for key, record in pairs
    ]
    _add_ratios(runs, of_each)
    return Tables(
        runs,
        _table([key | row for key, record in pairs for row in _accuracy_rows(record)], columns.ACCURACY),
        _table([key | dict(row) for key, record in pairs for row in record["costs"]], columns.COMPONENTS),
        _table([key | row for key, record in pairs for row in _task_rows(record)], columns.TASKS),
        _table([key | row for key, record in pairs for row in _bin_rows(record)], columns.RELIABILITY),
        stream_labels(kept),
    )


def strategy_labels(records: Sequence[_Record]) -> list[str]:
    """One label per record: the strategy's name, with its options where one name ran with several."""
    variants: dict[tuple[str, str, str], list[_Record]] = {}
    for record in records:
        name = record["strategy"]["name"]
        variants.setdefault((record["stream"]["name"], record["setting"], name), []).append(record)
    labels: dict[int, str] = {}
    for (_, _, name), group in variants.items():
        suffixes = distinguish([own_options(record) for record in group])
        for record, suffix in zip(group, suffixes, strict=True):
            labels[id(record)] = f"{name} ({suffix})" if suffix else name
    return [labels[id(record)] for record in records]


def distinguish(options: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells each set of options from the others, ``init=previous, members=2``; empty for equal ones."""
    flattened = [flat(one) for one in options]
    names = sorted({name for one in flattened for name in one})
    differing = [name for name in names if len({repr(one.get(name)) for one in flattened}) > 1]
    return [", ".join(f"{name}={one.get(name)}" for name in differing) for one in flattened]


def stream_labels(records: Iterable[_Record]) -> dict[tuple[str, str], str]:
    """A label for each (stream, setting): the stream's name, with its options where it ran in several."""
    settings: dict[str, dict[str, _Record]] = {}
    for record in records:
        settings.setdefault(record["stream"]["name"], {}).setdefault(record["setting"], record)
    labels: dict[tuple[str, str], str] = {}
    for stream, group in settings.items():
        suffixes = distinguish([_options(record) for record in group.values()])
        if len(set(suffixes)) < len(group) or max(map(len, suffixes)) > _MAX_SUFFIX:
            suffixes = list(group)
        for setting, suffix in zip(group, suffixes, strict=True):
            labels[stream, setting] = f"{stream} ({suffix})" if len(group) > 1 else stream
    return labels


def _options(record: _Record) -> dict[str, Any]:
    """Everything that a setting is the hash of, on one level."""
    network = record["network"]
    own = flat(network.get("options") or {}, "network.")
    return {
        **flat(record["stream"].get("options") or {}),
        "network": network["name"],
        **own,
        **flat(record["fit"]),
    }


def accuracy_matrix(record: _Record) -> np.ndarray:
    """The accuracy matrix of a record, ``(T, T)``, NaN where nothing was measured."""
    return np.array(record["accuracy"], dtype=np.float64)


def _run(record: _Record) -> dict[str, Any]:
    """The row of ``runs`` of one record, but for its keys and ratios."""
    last = max(record["tasks"], key=lambda row: row["trained_task"])
    final = max(row["trained_task"] for row in record["costs"])
    stored = [
        row for row in record["costs"] if row["trained_task"] == final and row["component"] != "optimizer"
    ]
    saved = [row["saved_bytes"] for row in record["tasks"]]
    R = accuracy_matrix(record)
    return {
        "average_accuracy": continual.average_accuracy(R),
        "forgetting": continual.forgetting(R),
        "backward_transfer": continual.backward_transfer(R),
        "forward_transfer": continual.forward_transfer(R, _baseline(record)),
        "learning_accuracy": continual.learning_accuracy(R),
        "parameters": _sum(row["parameters"] for row in stored),
        "bytes": _sum(row["bytes"] for row in stored),
        "flops_forward": last["flops_forward"],
        "flops_training": last["flops_training"],
        "seconds_training": last["seconds_training"],
        "seconds_evaluation": last["seconds_evaluation"],
        "disk_bytes": last["disk_bytes"],
        "saved_bytes": max(saved) if None not in saved else None,
        **{name: last.get(name) for name in columns.CALIBRATION},
        **_guesses(record, last["trained_task"]),
        **_tuning(record.get("tuning")),
        "num_tasks": record["stream"]["num_tasks"],
        "network": record["network"]["name"],
        "device": record["device"],
        "commit": record.get("commit"),
        **{f"version_{name}": version for name, version in sorted(record["versions"].items())},
    }


def _tuning(protocol: Mapping[str, Any] | None) -> dict[str, Any]:
    """How the strategy's options were chosen, as a number and in words."""
    if protocol is None:
        return {"tuning_trials": 0, "tuning": None}
    search = ", ".join(f"{name} in {space}" for name, space in protocol["search"].items())
    best = ", ".join(f"{name}={value}" for name, value in protocol["best"].items())
    words = (
        f"the best of {protocol['trials']} trials ({protocol['sampler']}) by {protocol['objective']}, on "
        f"{protocol['tuned_on']}, seeds {', '.join(map(str, protocol['seeds']))}, searching {search}: {best}, with "
        f"{100 * protocol['best_validation_accuracy']:.2f} % there; the trials took {protocol['flops']:.3g} training "
        f"FLOPs and {protocol['seconds']:.3g} s"
    )
    return {"tuning_trials": protocol["trials"], "tuning": words}


def _guesses(record: _Record, last_task: int) -> dict[str, float | None]:
    """What was guessed without knowing the task, mean over the tasks after the last one."""
    rows = [row for row in record.get("uncertainty", []) if row["trained_task"] == last_task]
    means = {}
    for name in ("task_identification_accuracy", "class_incremental_accuracy"):
        total = _sum(row.get(name) for row in rows)
        means[name] = None if total is None or not rows else total / len(rows)
    return means


def _baseline(record: _Record) -> np.ndarray | None:
    """The untrained network's accuracy on every task, where the record has it under ``baseline``."""
    return np.array(record["baseline"], dtype=np.float64) if record.get("baseline") is not None else None


def _accuracy_rows(record: _Record) -> list[dict[str, Any]]:
    beside = {(row["trained_task"], row["eval_task"]): row for row in record.get("uncertainty", [])}
    return [
        {
            **beside.get((trained, evaluated), {}),
            "trained_task": trained,
            "eval_task": evaluated,
            "accuracy": value,
        }
        for trained, row in enumerate(record["accuracy"])
        for evaluated, value in enumerate(row)
        if value is not None
    ]


def _task_rows(record: _Record) -> list[dict[str, Any]]:
    so_far = continual.average_accuracy_so_far(accuracy_matrix(record))
    return [dict(row) | {"average_accuracy": so_far[row["trained_task"]]} for row in record["tasks"]]


def _bin_rows(record: _Record) -> list[dict[str, Any]]:
    """The reliability diagram after the last task; a record of schema 1 has none."""
    bins = record.get("reliability") or {name: [] for name in RELIABILITY}
    rows = zip(*(bins[name] for name in RELIABILITY), strict=True)
    return [{"bin": i, **dict(zip(RELIABILITY, row, strict=True))} for i, row in enumerate(rows)]


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum; None where a part of it is not known."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _table(rows: list[dict[str, Any]], documented: tuple[columns.Column, ...]) -> pd.DataFrame:
    """A table of the documented columns in their order, then the versions; numbers as int64 or float64."""
    order = columns.names(documented)
    versions = sorted({name for row in rows for name in row if name.startswith("version_")})
    table = pd.DataFrame(rows, columns=pd.Index([*order, *versions], dtype=object))
    for column in documented:
        if column.unit:
            table[column.name] = pd.to_numeric(table[column.name])
    return table


def _add_ratios(runs: pd.DataFrame, vanilla: Sequence[int | None]) -> None:
    """Fill the ``ratio_*`` columns; ``vanilla`` has for each row that of its vanilla run, or None."""
    for cost in (*columns.COSTS, "disk_bytes"):
        values = runs[cost].to_numpy(dtype=np.float64)
        reference = np.array([np.nan if row is None else values[row] for row in vanilla], dtype=np.float64)
        runs[f"ratio_{cost}"] = values / np.where(reference == 0, np.nan, reference)


def _group(key: Mapping[str, Any]) -> tuple[Any, ...]:
    return key["stream"], key["setting"], key["seed"]


def _is_vanilla(record: _Record) -> bool:
    return record["strategy"]["name"] == VANILLA
