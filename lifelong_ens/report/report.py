"""A report: what the records of a comparison say, as tidy tables, a summary and plots."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lifelong_ens.errors import InputError
from lifelong_ens.report import columns
from lifelong_ens.report.headline import headline
from lifelong_ens.report.markdown import html_table, latex_table, markdown_table, summary_markdown
from lifelong_ens.report.records import check_record, load_records
from lifelong_ens.report.significance import significance
from lifelong_ens.report.tables import build_tables
from lifelong_ens.store import write_bytes

TABLES = ("accuracy", "costs", "runs", "tasks")
"""The tables that are written as files."""


@dataclass(frozen=True, eq=False)
class Report:
    """The runs of one or more comparisons.

    Attributes:
        runs: one row per run: final metrics, final costs, ratios to the vanilla network, where it ran.
        accuracy: one row per measured cell of an accuracy matrix, with what ``uncertainty`` says of it.
        costs: one row per run, trained task and component.
        tasks: one row per run and trained task.
        reliability: one row per run and bin of confidence, after the last task; of records of schema 1, none.
        labels: the name of each (stream, setting) in summaries and plots.
    """

    runs: pd.DataFrame
    accuracy: pd.DataFrame
    costs: pd.DataFrame
    tasks: pd.DataFrame
    reliability: pd.DataFrame
    labels: Mapping[tuple[str, str], str]

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> Report:
        """The report of records in memory, strategies in the order in which they come.

        Raises:
            InputError: if there is none, or (DamagedFileError) one of them is no record.
        """
        checked = list(records)
        for i, record in enumerate(checked):
            check_record(record, f"record {i}")
        if not checked:
            raise InputError("a report needs at least one record, got none; run a comparison first")
        return cls(*build_tables(checked))

    @classmethod
    def load(cls, out: str | os.PathLike[str]) -> Report:
        """The report of ``out/records/*.json``; a damaged record is left out with a warning that names it.

        Raises:
            InputError: if no record can be read.
        """
        return cls.from_records(load_records(out))

    @property
    def uncertainty(self) -> pd.DataFrame:
        """One row per measured cell of an accuracy matrix: calibration, entropy, disagreement, guessed tasks."""
        return self.accuracy.loc[:, columns.names(columns.UNCERTAINTY)]

    def to_markdown(self) -> str:
        """The headline table for a Markdown document."""
        return markdown_table(self.headline().reset_index())

    def to_latex(self) -> str:
        """The headline table for a paper, in the style of the package booktabs."""
        return latex_table(self.headline().reset_index())

    def _repr_html_(self) -> str:
        return html_table(self.headline().reset_index())

    def summary(self) -> pd.DataFrame:
        """Mean and std over seeds: index (stream, strategy), columns (metric, mean | std).

        The std is that of a sample (n - 1), NaN for one seed. A metric that is undefined for one of the seeds
        is NaN. A stream that ran in several settings has one row for each, named by what tells them apart.
        """
        numbers = [column.name for column in columns.RUNS if column.unit and column.name != "num_tasks"]
        streams = pd.Series(
            [self.labels[pair] for pair in zip(self.runs["stream"], self.runs["setting"], strict=True)],
            index=self.runs.index,
            name="stream",
        )
        groups: Any = self.runs.groupby([streams, self.runs["strategy"]], sort=False)[numbers]
        size = groups.size()
        complete = groups.count().eq(size, axis=0)
        both = {"mean": groups.mean().where(complete), "std": groups.std().where(complete)}
        table = pd.concat(both, axis=1).swaplevel(axis=1)
        order = pd.MultiIndex.from_product([numbers, list(both)], names=["metric", "statistic"])
        return table.reindex(columns=order)

    def headline(self) -> pd.DataFrame:
        """The table to print: strings, one row per strategy in first-seen order.

        With several streams or settings the index has a level more, the stream.
        """
        return headline(self.runs, self.labels)

    def significance(self, baseline: str = "finetune") -> pd.DataFrame:
        """Average accuracy with 95 % intervals over seeds, and a paired test against ``baseline``."""
        return significance(self.runs, self.labels, baseline)

    def columns(self) -> pd.DataFrame:
        """Every column of the tables: name, table, dtype (float64 where a number lacks), unit, meaning."""
        versions = [name for name in self.runs.columns if name.startswith("version_")]
        documented = {
            "runs": (*columns.RUNS, *map(columns.version_column, versions)),
            "accuracy": columns.ACCURACY,
            "costs": columns.COMPONENTS,
            "uncertainty": columns.UNCERTAINTY,
            "tasks": columns.TASKS,
            "reliability": columns.RELIABILITY,
        }
        rows = [
            (column.name, table, str(getattr(self, table)[column.name].dtype), column.unit, column.meaning)
            for table, group in documented.items()
            for column in group
        ]
        return pd.DataFrame(rows, columns=pd.Index(["name", "table", "dtype", "unit", "meaning"]))

    def _written_columns(self) -> pd.DataFrame:
        """The columns of the tables that are files."""
        documented: Any = self.columns()
        return documented[documented["table"].isin(TABLES)]

    def write(self, out: str | os.PathLike[str], baseline: str = "finetune") -> list[Path]:
        """Write the four tables as CSV, ``summary.md`` and three plots into ``out``; returns their paths.

        The summary tests every strategy against ``baseline``.

        Each file is replaced whole, so that what was there stays readable until the new one is complete.
        """
        from lifelong_ens.report.plots import draw_all

        plots = draw_all(self.runs, self.accuracy, self.tasks, self.labels)
        summary = summary_markdown(
            self.headline(), self.significance(baseline), self.runs, self._written_columns(), plots
        )
        files = {f"{name}.csv": getattr(self, name).to_csv(index=False).encode() for name in TABLES}
        files |= {"summary.md": summary.encode(), **plots}
        for name, data in files.items():
            write_bytes(Path(out) / name, data)
        return [Path(out) / name for name in files]
