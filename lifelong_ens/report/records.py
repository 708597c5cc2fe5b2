"""The records of runs: what a record must hold, and reading a folder of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lifelong_ens.errors import DamagedFileError, InputError
from lifelong_ens.store import read_json

SCHEMA = 2
"""1 had no ``reliability``; all else is the same."""

_logger = logging.getLogger(__name__)

_KEYS: dict[str, type | tuple[type, ...]] = {
    "stream": Mapping,
    "strategy": Mapping,
    "network": Mapping,
    "fit": Mapping,
    "seed": int,
    "setting": str,
    "accuracy": list,
    "costs": list,
    "tasks": list,
    "versions": Mapping,
    "device": str,
}
RELIABILITY = ("count", "confidence", "accuracy")
_COST_KEYS = ("trained_task", "component", "parameters", "bytes", "flops_forward")
_TASK_KEYS = (
    "trained_task",
    "num_classes",
    "flops_forward",
    "flops_forward_rank1",
    "flops_training",
    "flops_training_rank1",
    "saved_bytes",
    "disk_bytes",
    "seconds_training",
    "seconds_evaluation",
)
_TUNING_KEYS: dict[str, type | tuple[type, ...]] = {
    "tuned_on": str,
    "objective": str,
    "sampler": str,
    "search": Mapping,
    "seeds": list,
    "num_tasks_used": int,
    "trials": int,
    "best": Mapping,
    "best_validation_accuracy": (int, float),
    "flops": int,
    "seconds": (int, float),
}


def check_record(record: Any, source: str) -> None:
    """Check that ``record`` is one of ours and complete; ``source`` names it in the message.

    Raises:
        DamagedFileError: if it is of a newer schema, or anything that the report reads is missing or
        ill-formed.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("schema"), int):
        raise DamagedFileError(f"{source} is not a record of a run (it states no schema); move it away")
    if record["schema"] > SCHEMA:
        raise DamagedFileError(
            f"{source} has schema {record['schema']}, this version reads up to {SCHEMA}; upgrade lifelong-ens"
        )
    for key, kind in _KEYS.items():
        if key not in record:
            raise _damaged(source, f"`{key}` is missing")
        if not isinstance(record[key], kind):
            raise _damaged(source, f"`{key}` is a {type(record[key]).__name__}")
    for key in ("stream", "strategy", "network"):
        if not isinstance(record[key].get("name"), str):
            raise _damaged(source, f"`{key}.name` is missing")
    if record.get("tuning") is not None:
        check_tuning(record["tuning"], f"{source}: `tuning`")
    _check_accuracy(record, source)
    check_reliability(record.get("reliability") or {}, source)
    for table, keys in (("costs", _COST_KEYS), ("tasks", _TASK_KEYS)):
        _check_rows(record[table], keys, len(record["accuracy"]), f"{source}: `{table}`")


def check_tuning(protocol: Any, source: str) -> None:
    """Check that ``protocol`` says how a strategy was tuned, as ``lifelong-ens tune`` writes it.

    Raises:
        DamagedFileError: if anything is missing or ill-formed.
    """
    if not isinstance(protocol, Mapping):
        raise DamagedFileError(
            f"{source} is a {type(protocol).__name__}, not a protocol of tuning; tune again"
        )
    for key, kind in _TUNING_KEYS.items():
        if not isinstance(protocol.get(key), kind):
            raise DamagedFileError(f"{source} has no proper `{key}`; tune again")


def check_reliability(bins: Any, source: str) -> None:
    """Check that a reliability diagram has its three lists, of one length; one of schema 1 is empty.

    Raises:
        DamagedFileError: if it has not.
    """
    lists = [bins.get(name) for name in RELIABILITY] if isinstance(bins, Mapping) else []
    lengths = {len(one) if isinstance(one, list) else -1 for one in lists}
    if bins and (len(lengths) != 1 or -1 in lengths):
        raise _damaged(source, f"`reliability` is not {', '.join(RELIABILITY)} of every bin")


def load_records(out: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of ``compare`` in a folder, see ``read_records``."""
    return read_records(out, check_record, "compare")


def read_records(
    out: str | os.PathLike[str], check: Callable[[Any, str], None], command: str
) -> list[dict[str, Any]]:
    """The records in ``out/records/*.json`` as they were started; damaged ones are left out, named in a warning.

    Args:
        out: The folder.
        check: Raises ``DamagedFileError`` of what is no record; told the file's name.
        command: That makes such records.

    Raises:
        InputError: if there is no record, or none that can be read; the first one's trouble is in the
        message.
    """
    folder = Path(out) / "records"
    records, damaged = scan_records(out, check)
    for error in damaged:
        _logger.warning("left out of the report: %s", error)
    if damaged and not records:
        raise InputError(f"none of the {len(damaged)} records in {folder} can be read: {damaged[0]}")
    if not records:
        raise InputError(f"no records in {folder}; run `lifelong-ens {command} --out {os.fspath(out)}` first")
    return records


def scan_records(
    out: str | os.PathLike[str], check: Callable[[Any, str], None]
) -> tuple[list[dict[str, Any]], list[DamagedFileError]]:
    """The records in ``out/records/*.json`` as they were started, and what is wrong with those that cannot be read."""
    records: list[dict[str, Any]] = []
    damaged: list[DamagedFileError] = []
    for path in sorted((Path(out) / "records").glob("*.json")):
        try:
            record = read_json(path)
            check(record, os.fspath(path))
        except DamagedFileError as error:
            damaged.append(error)
        else:
            records.append(record)
    return sorted(records, key=lambda record: str(record.get("started"))), damaged


def newest_of_each_run(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One record per run (stream, setting, strategy with its options, seed): of several the latest."""
    runs: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for record in records:
        run = (
            record["stream"]["name"],
            record["setting"],
            record["strategy"]["name"],
            repr(own_options(record)),
            str(record["seed"]),
        )
        if run in runs:
            _logger.warning("two records of the run %s, seed %s: the later is used", run[2], run[4])
        if run not in runs or str(record.get("finished")) >= str(runs[run].get("finished")):
            runs[run] = record
    return list(runs.values())


def own_options(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a record's strategy; also ``out``, its folder, where several are read."""
    out = {"out": record["out"]} if "out" in record else {}
    return flat(record["strategy"].get("options") or {}) | out


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as one level, ``{"a": {"b": 1}}`` as ``{"a.b": 1}``, sorted by name."""
    found: dict[str, Any] = {}
    for key in sorted(options, key=str):
        value = options[key]
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _check_accuracy(record: Mapping[str, Any], source: str) -> None:
    rows, num_tasks = record["accuracy"], record["stream"].get("num_tasks")
    if not isinstance(num_tasks, int) or num_tasks < 1:
        raise _damaged(source, "`stream.num_tasks` is not a positive number")
    if len(rows) != num_tasks or any(not isinstance(row, list) or len(row) != num_tasks for row in rows):
        raise _damaged(source, f"`accuracy` is not a {num_tasks} x {num_tasks} matrix")
    baseline = record.get("baseline")
    if baseline is not None and (not isinstance(baseline, list) or len(baseline) != num_tasks):
        raise _damaged(source, f"`baseline` is not a list of {num_tasks} accuracies")
    for value in (value for row in (*rows, baseline or []) for value in row):
        if value is not None and not (_is_number(value) and 0 <= value <= 1):
            raise _damaged(source, f"an accuracy is {value!r}, which is neither in [0, 1] nor null")


def _check_rows(rows: list[Any], keys: tuple[str, ...], num_tasks: int, where: str) -> None:
    if not rows:
        raise _damaged(where, "no rows")
    for row in rows:
        if not isinstance(row, Mapping):
            raise _damaged(where, f"a row is a {type(row).__name__}")
        for key in keys:
            if key not in row:
                raise _damaged(where, f"`{key}` is missing")
            if not _is_good(key, row[key], num_tasks):
                raise _damaged(where, f"`{key}` is {row[key]!r}")


def _is_good(key: str, value: object, num_tasks: int) -> bool:
    """Whether a row may hold ``value`` under ``key``; what could not be measured is null."""
    if key == "component":
        return isinstance(value, str)
    if key == "trained_task":
        return isinstance(value, int) and 0 <= value < num_tasks
    return value is None or _is_number(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _damaged(source: str, what: str) -> DamagedFileError:
    return DamagedFileError(f"{source}: {what}; delete the record and run again")
