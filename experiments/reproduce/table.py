"""The table of a reproduction, made from records: our numbers, the published ones beside them, and what differs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from experiments.options import make_fit
from experiments.reproduce.declaration import Reproduction, Row
from experiments.run import Named
from lifelong_ens.errors import InputError
from lifelong_ens.report import Report
from lifelong_ens.report.headline import duration, percent, quantity, with_ratio
from lifelong_ens.report.markdown import markdown_table
from lifelong_ens.report.tables import VANILLA

_UNKNOWN = "–"
_ALWAYS_SAID = ("epochs", "batch_size", "optimizer", "learning_rate")
_MEANS = (
    "average_accuracy",
    "forgetting",
    "bytes",
    "ratio_bytes",
    "flops_training",
    "ratio_flops_training",
    "seconds_training",
    "ratio_seconds_training",
)


@dataclass(frozen=True, eq=False)
class Table:
    """The table of one setting.

    Attributes:
        reproduction: What was declared, at full settings.
        numbers: One row for each declared one, NaN where it has not run.
        report: Of these runs, with the labels of rows as names of strategies.
        records: What it was made from.
    """

    reproduction: Reproduction
    numbers: pd.DataFrame
    report: Report
    records: Sequence[Mapping[str, Any]]

    @classmethod
    def of(
        cls, reproduction: Reproduction, records: Iterable[Mapping[str, Any]], setting: str | None = None
    ) -> Table:
        """The table of the runs in one setting, that of the newest run if not given; other records are left out.

        Raises:
            InputError: No record is of this reproduction.
        """
        labels = _labels(reproduction)
        ours = [record for record in records if _strategy_key(record["strategy"]) in labels]
        if not ours:
            raise InputError(
                f"there are no records of {reproduction.name}; run lifelong-ens reproduce {reproduction.name} first"
            )
        setting = setting or max(ours, key=lambda record: str(record["started"]))["setting"]
        kept = [record for record in ours if record["setting"] == setting]
        named = [
            {**record, "strategy": {"name": labels[_strategy_key(record["strategy"])]}} for record in kept
        ]
        report = Report.from_records(named)
        return cls(reproduction, _numbers(reproduction, report), report, kept)

    def markdown(self) -> str:
        """The whole of ``table.md``."""
        notes = [f"* {note}" for note in self.reproduction.notes]
        title = f"# {self.reproduction.name}: {self.reproduction.summary}"
        return "\n\n".join([title, self.block(), *(["\n".join(notes)] if notes else [])]) + "\n"

    def block(self) -> str:
        """The table and the setting it is of, without title and notes; what README shows."""
        source = f"Published: {self.reproduction.source}. " if self.reproduction.source else ""
        other = list(self._other_than_declared())
        warning = f"**Not at full settings:** {', '.join(other)}. " if other else ""
        spread = "" if bool(self.numbers["half_width"].isna().all()) else " ± is a 95 % interval over seeds."
        return f"{markdown_table(self.strings())}\n\n{warning}{source}{self._setting()}{spread}"

    def strings(self) -> pd.DataFrame:
        """The cells as people read them."""
        rows: list[Any] = [row for _, row in self.numbers.iterrows()]
        columns = {"strategy": [row["row"] for row in rows], **self._columns(rows)}
        return pd.DataFrame(columns)

    def _columns(self, rows: list[Any]) -> dict[str, list[str]]:
        if self.reproduction.after_tasks:
            return {
                f"after {count} tasks" if count > 1 else "after 1 task": [
                    quantity([row[f"bytes_after_{count}"]], "B") for row in rows
                ]
                for count in self.reproduction.after_tasks
            } | {"added by the last": [quantity([row["bytes_of_last_task"]], "B") for row in rows]}
        columns = {"accuracy %": [_accuracy(row) for row in rows]}
        if self.reproduction.reference:
            columns[f"points to `{self.reproduction.reference}`"] = [_difference(row) for row in rows]
        columns["forgetting, points"] = [_known(row["forgetting"], lambda x: percent([x])) for row in rows]
        columns["memory"] = [with_ratio(quantity([row["bytes"]], "B"), [row["ratio_bytes"]]) for row in rows]
        columns |= _published("memory", rows)
        columns["training FLOPs"] = [
            with_ratio(quantity([row["flops_training"]]), [row["ratio_flops_training"]]) for row in rows
        ]
        columns["training time"] = [
            with_ratio(duration([row["seconds_training"]]), [row["ratio_seconds_training"]]) for row in rows
        ]
        return columns | _published("computation", rows)

    def _setting(self) -> str:
        record = self.records[0]
        classes = sorted({row["num_classes"] for row in record["tasks"]})
        options = {name: value for name, value in record["stream"]["options"].items() if name != "num_tasks"}
        stream = _call(record["stream"]["name"], options)
        stream += f", {record['stream']['num_tasks']} tasks of {_range(classes)} classes"
        network = _call(record["network"]["name"], record["network"].get("options", {}))
        default = asdict(make_fit({}))
        fit = [
            f"{name} {value}"
            for name, value in record["fit"].items()
            if name in _ALWAYS_SAID or value != default[name]
        ]
        seeds = sorted({record["seed"] for record in self.records})
        devices = sorted({record["device"] for record in self.records})
        versions = sorted({record["versions"]["torch"] for record in self.records})
        return (
            f"{stream}; {network}; {', '.join(fit)}; seed{'s' if len(seeds) > 1 else ''} "
            f"{', '.join(map(str, seeds))}; {', '.join(devices)}, torch {', '.join(versions)}."
        )

    def _other_than_declared(self) -> Iterator[str]:
        """What these runs were given instead of the declared settings."""
        full, record = self.reproduction, self.records[0]
        pairs = [
            (make_fit(full.fit).as_dict(), record["fit"]),
            (full.stream_options, record["stream"].get("options", {})),
        ]
        for declared, given in pairs:
            for name in sorted({*declared, *given}):
                yield from _instead(name, given.get(name), declared.get(name))
        yield from _instead("seeds", len({record["seed"] for record in self.records}), full.seeds)
        ran = {_strategy_key(record["strategy"]) for record in self.records}
        for row, quick in zip(full.rows, full.quickened().rows, strict=True):
            if _key(row) not in ran and _key(quick) in ran:
                for name in sorted({*row.options, *quick.options}):
                    yield from _instead(
                        f"{name} of {row.label}", quick.options.get(name), row.options.get(name)
                    )


def _labels(reproduction: Reproduction) -> dict[str, str]:
    """What a report calls each strategy with its options, as they are at quick and at full settings."""
    rows = [*reproduction.quickened().rows, *reproduction.rows]
    return {_key(row): _name(row) for row in rows}


def _name(row: Row) -> str:
    """The label; but a report finds the vanilla network, of which all ratios are, by its strategy's name."""
    return VANILLA if row.strategy == VANILLA else row.label


def _key(row: Row) -> str:
    return _strategy_key(Named(row.strategy, row.recorded_options()).as_dict())


def _strategy_key(strategy: Mapping[str, Any]) -> str:
    return json.dumps([strategy["name"], strategy.get("options") or {}], sort_keys=True)


def _numbers(reproduction: Reproduction, report: Report) -> pd.DataFrame:
    """One row for each declared one: means over seeds, intervals, ratios, published ratios, memory over tasks."""
    names = {row.label: _name(row) for row in reproduction.rows}
    sure = report.significance(names.get(reproduction.reference or "", VANILLA)).set_index("strategy")
    means: Any = report.runs.groupby("strategy")[list(_MEANS)].mean()
    measured = means.join(sure[["seeds", "low", "high", "difference", "p_value"]])
    measured["half_width"] = (measured["high"] - measured["low"]) / 2
    if reproduction.after_tasks:
        measured = measured.join(_memory(report, reproduction.after_tasks))
    declared = [
        {
            "row": row.label,
            "strategy": row.strategy,
            "options": json.dumps(row.recorded_options(), sort_keys=True),
            "published_memory": math.nan if row.memory is None else row.memory,
            "published_computation": math.nan if row.computation is None else row.computation,
        }
        for row in reproduction.rows
    ]
    return pd.concat(
        [pd.DataFrame(declared), measured.reindex(list(names.values())).reset_index(drop=True)], axis=1
    )


def _memory(report: Report, after_tasks: Sequence[int]) -> pd.DataFrame:
    """Bytes stored after so many tasks and what the last one added, mean over seeds, one row per strategy."""
    stored: Any = report.costs[report.costs["component"] != "optimizer"]
    totals = stored.groupby(["strategy", "seed", "trained_task"])["bytes"].sum()
    by_task = (
        totals.groupby(["strategy", "trained_task"]).mean().unstack().reindex(columns=range(after_tasks[-1]))
    )
    memory = {f"bytes_after_{count}": by_task[count - 1] for count in after_tasks}
    return pd.DataFrame(memory | {"bytes_of_last_task": by_task.diff(axis=1)[after_tasks[-1] - 1]})


def _instead(name: str, given: Any, declared: Any) -> Iterator[str]:
    if given != declared:
        yield f"{name} {given}" if declared is None else f"{name} {given} instead of {declared}"


def _call(name: str, options: Mapping[str, Any]) -> str:
    inside = ", ".join(f"{option}={value}" for option, value in options.items())
    return f"{name}({inside})" if inside else name


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _known(value: float, show: Callable[[float], str]) -> str:
    return _UNKNOWN if math.isnan(value) else show(value)


def _accuracy(row: Any) -> str:
    mean = _known(row["average_accuracy"], lambda x: f"{100 * x:.2f}")
    return mean if math.isnan(row["half_width"]) else f"{mean} ± {100 * row['half_width']:.2f}"


def _difference(row: Any) -> str:
    points = _known(row["difference"], lambda x: f"{100 * x:+.2f}")
    return points if math.isnan(row["p_value"]) else f"{points} (p = {row['p_value']:.2g})"


def _published(cost: str, rows: Sequence[Any]) -> dict[str, list[str]]:
    """The column of a published ratio, if there is one."""
    ratios = [row[f"published_{cost}"] for row in rows]
    if all(map(math.isnan, ratios)):
        return {}
    return {f"published {cost}": [_known(ratio, lambda x: f"{x:.2f}x") for ratio in ratios]}
