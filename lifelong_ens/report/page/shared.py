"""What pages of strategies and of ensembles have in common: facts, options, samples, runs that are not finished."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lifelong_ens.errors import DamagedFileError
from lifelong_ens.report.page.model import Block, Cell, Head, Row, Sample, Series, State, Table
from lifelong_ens.report.records import flat
from lifelong_ens.report.samples import read_samples
from lifelong_ens.report.unfinished import Unfinished

_Record = Mapping[str, Any]
MAX_SAMPLES = 30


@dataclass(frozen=True)
class Source:
    """A folder that a page is made of: its records, what it says of other runs, and what cannot be read."""

    out: Path
    records: list[dict[str, Any]]
    unfinished: list[Unfinished]
    damaged: list[DamagedFileError]


def states(sources: Iterable[Source], setting: str) -> list[State]:
    """Runs of one setting that are not finished."""
    return [
        State(one.label, one.state, one.reason)
        for source in sources
        for one in source.unfinished
        if one.setting == setting
    ]


def other_states(sources: Iterable[Source], settings: Iterable[str]) -> list[State]:
    """Runs that belong to no comparison of the page, and records that cannot be read."""
    shown = set(settings)
    found = []
    for source in sources:
        found += [
            State(one.label, one.state, one.reason) for one in source.unfinished if one.setting not in shown
        ]
        found += [State("a record", "unreadable", str(error)) for error in source.damaged]
    return found


def named(one: Mapping[str, Any]) -> str:
    """``resnet18 (width 20)``."""
    options = ", ".join(f"{name} {value}" for name, value in flat(one.get("options") or {}).items())
    return f"{one['name']} ({options})" if options else one["name"]


def training(fit: Mapping[str, Any]) -> str:
    """The training in a few words."""
    known = {
        "epochs": "{} epochs",
        "batch_size": "batches of {}",
        "optimizer": "{}",
        "learning_rate": "learning rate {}",
    }
    parts = [words.format(fit[name]) for name, words in known.items() if name in fit]
    return ", ".join([*parts, *([f"{fit['schedule']} schedule"] if "schedule" in fit else [])])


def where(records: Sequence[_Record]) -> list[tuple[str, str]]:
    """Seeds, devices, versions, commits and dates."""
    versions = sorted({f"{name} {value}" for one in records for name, value in one["versions"].items()})
    times = (one.get(key) for one in records for key in ("started", "finished"))
    dates = sorted(_time(time)[:16] for time in times if time)
    facts = [
        ("seeds", ", ".join(map(str, sorted({one["seed"] for one in records})))),
        ("device", ", ".join(sorted({one["device"] for one in records}))),
        ("versions", ", ".join(versions)),
        (
            "commit",
            ", ".join(sorted({str(one["commit"])[:10] for one in records if one.get("commit")}))
            or "not known",
        ),
    ]
    if not dates:
        return facts
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return [*facts, ("date", f"{span} UTC")]


def samples(sources: Iterable[Source], setting: str, tasks: Sequence[str]) -> tuple[list[Sample], str]:
    """Strips of images of the first tasks, each with its words, and a note."""
    for source in sources:
        found = read_samples(source.out, setting, len(tasks))
        if found is not None:
            break
    else:
        return [], "Sample images were not kept with these records."
    seed, strips = found
    shown = [
        Sample(
            f"data:image/png;base64,{base64.b64encode(strip.png).decode()}",
            strip.width,
            strip.height,
            f"Task {i + 1}" if len(tasks) > 1 else "Test images",
            words,
        )
        for i, (strip, words) in enumerate(zip(strips[:MAX_SAMPLES], tasks, strict=False))
    ]
    note = (
        f"Test images of seed {seed}; other seeds order the classes in another way." if len(tasks) > 1 else ""
    )
    more = f" The first {MAX_SAMPLES} of {len(tasks)} tasks." if len(tasks) > MAX_SAMPLES else ""
    return shown, note + more


def options_block(
    records: Sequence[_Record],
    labels: Sequence[str],
    kind: str,
    shared: Mapping[str, Any],
    series: Mapping[str, Series],
) -> Block:
    """Every option of every run: what all share, and a row for each run.

    Args:
        records: Of one comparison.
        labels: The name of each one's series.
        kind: Under what records name their own options: ``strategy`` or ``method``.
        shared: What all have in common, on one level.
        series: By name.
    """
    all_rows = [Row(name, [Cell(text_of(value))]) for name, value in shared.items()]
    runs = [
        Row(
            series[label],
            [
                Cell(str(one["seed"]), sort=one["seed"]),
                Cell(named_options(one[kind])),
                Cell(one["device"]),
                Cell(_time(one.get("started"))),
                Cell(_time(one.get("finished"))),
                Cell(str(one.get("commit") or "–")[:10]),
                Cell(", ".join(f"{name} {value}" for name, value in one["versions"].items())),
                Cell(" ".join(_remarks(one)) or "–"),
            ],
        )
        for one, label in zip(records, labels, strict=True)
    ]
    heads = [
        Head(name)
        for name in (
            kind,
            "seed",
            "own options",
            "device",
            "started",
            "finished",
            "commit",
            "versions",
            "remarks",
        )
    ]
    return Block(
        "Every option of every run",
        tables=[
            Table("What all runs share", [Head("option"), Head("value")], all_rows),
            Table("Runs", heads, runs, "An option that is not named has its default."),
        ],
    )


def named_options(one: Mapping[str, Any]) -> str:
    """``init=ones, rank=2``; what says that there is none."""
    return (
        ", ".join(f"{name}={text_of(value)}" for name, value in flat(one.get("options") or {}).items())
        or "defaults"
    )


def text_of(value: Any) -> str:
    """A value of an option."""
    return value if isinstance(value, str) else json.dumps(value)


def _time(time: Any) -> str:
    return str(time or "–")[:19].replace("T", " ")


def _remarks(record: _Record) -> list[str]:
    notes = [str(note) for note in record.get("notes") or []]
    tuned = record.get("tuning")
    return [*notes, f"tuned by {tuned['trials']} trials on {tuned['tuned_on']}"] if tuned else notes
