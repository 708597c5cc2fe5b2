"""The command lines that make given records again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lifelong_ens.report.records import flat
from lifelong_ens.training.fit import Fit

_Record = Mapping[str, Any]
PYTHON = "given"
"""The network's name where strategies were made in Python, which no command line can say."""


def compare_commands(records: Sequence[_Record], out: str) -> list[str]:
    """Those of ``compare`` for records of one stream and setting; empty where they were made from Python.

    A strategy that ran with several sets of options or seeds needs several.
    """
    if not records or records[0]["network"]["name"] == PYTHON:
        return []
    first = records[0]
    shared = [*_named("stream", first["stream"]), *_named("network", first["network"])]
    commands = []
    for runs in _rounds(records, "strategy"):
        names = list(runs)
        own = [part for one in runs.values() for part in _options(one[0]["strategy"])]
        inference = runs[names[0]][0].get("task_inference", "none")
        guess = [] if inference == "none" else ["--task_inference", inference]
        tail = [*_fit(first["fit"]), *guess, "--seeds", _seeds(runs[names[0]]), "--out", out]
        commands.append(_line(["compare", *shared, "--strategies", ",".join(names), *own, *tail]))
    return commands


def ensemble_commands(records: Sequence[_Record], out: str) -> list[str]:
    """Those of ``ensemble`` for records of one data set and setting."""
    first = records[0]
    protocol = first["protocol"]
    shared = [*_named("data", first["data"]), *_named("network", first["network"])]
    shared += ["--members", str(first["asked_members"])]
    if first["data"].get("held_out"):
        shared += ["--held_out", str(first["data"]["held_out"])]
    if "cifar_c" in protocol["corruptions"]:
        shared += ["--cifar_c", "DIR"]
    elif protocol["corruptions"]:
        shared += ["--corruptions", ",".join(protocol["corruptions"])]
    if protocol.get("corrupted_images"):
        shared += ["--corrupted_images", str(protocol["corrupted_images"])]
    foreign = [f"{name}=DIR" for name in protocol["foreign"] if name != "held_out"]
    shared += ["--ood", ",".join(foreign)] if foreign else []
    shared += ["--calibrate"] if protocol.get("calibrate") else []
    commands = []
    for runs in _rounds(records, "method"):
        names = list(runs)
        own = [part for one in runs.values() for part in _options(one[0]["method"])]
        tail = [*_fit(first["fit"]), "--seeds", _seeds(runs[names[0]]), "--out", out]
        commands.append(_line(["ensemble", *shared, "--methods", ",".join(names), *own, *tail]))
    return commands


def _rounds(records: Iterable[_Record], kind: str) -> list[dict[str, list[_Record]]]:
    """The records of each command, by name: one set of options for each name, and the same seeds for all."""
    variants: dict[str, dict[str, list[_Record]]] = {}
    for record in records:
        told = repr((flat(record[kind].get("options") or {}), record.get("task_inference", "none")))
        variants.setdefault(record[kind]["name"], {}).setdefault(told, []).append(record)
    rounds: dict[tuple[Any, ...], dict[str, list[_Record]]] = {}
    for name, sets in variants.items():
        for number, runs in enumerate(sets.values()):
            told = (number, _seeds(runs), runs[0].get("task_inference", "none"))
            rounds.setdefault(told, {})[name] = runs
    return list(rounds.values())


def _named(option: str, named: Mapping[str, Any]) -> list[str]:
    return [f"--{option}", named["name"], *_options(named)]


def _options(named: Mapping[str, Any]) -> list[str]:
    """Options under their owner's name, so that nobody else takes them."""
    owner = named["name"].rpartition(":")[2]
    return [
        part
        for name, value in flat(named.get("options") or {}).items()
        for part in (f"--{owner}.{name}", _text(value))
    ]


def _fit(fit: Mapping[str, Any]) -> list[str]:
    """Options of training that are not the defaults."""
    defaults = asdict(Fit())
    changed = {name: value for name, value in fit.items() if name not in defaults or value != defaults[name]}
    return [part for name, value in changed.items() for part in (f"--training.{name}", _text(value))]


def _seeds(records: Sequence[_Record]) -> str:
    """A count where they are the first so many, else a list."""
    seeds = sorted({record["seed"] for record in records})
    if seeds == list(range(len(seeds))):
        return str(len(seeds))
    return ",".join(map(str, seeds)) + ("," if len(seeds) == 1 else "")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _line(parts: Sequence[str]) -> str:
    """One command, an option with its value on each line."""
    lines, line = [], f"lifelong-ens {parts[0]}"
    for part in parts[1:]:
        if part.startswith("--"):
            lines.append(line)
            line = f"    {part}"
        else:
            line += f" {shlex.quote(part)}"
    return " \\\n".join([*lines, line])
