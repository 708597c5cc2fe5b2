"""A declared comparison of ensembles: its rows, the published numbers, and the table with both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streams
from experiments.ensembles import STREAMS
from lifelong_ens.errors import InputError

if TYPE_CHECKING:
    from experiments.ensembles.plan import EnsemblePlan

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """A published row: accuracy in percent, NLL in nats, ECE in [0, 1]; None where it was not given."""

    accuracy: float | None = None
    nll: float | None = None
    ece: float | None = None

    def __str__(self) -> str:
        parts = [
            *([] if self.accuracy is None else [f"{self.accuracy:.1f} %"]),
            *([] if self.nll is None else [f"{self.nll:.3f}"]),
            *([] if self.ece is None else [f"{self.ece:.3f}"]),
        ]
        return " / ".join(parts) or "–"


@dataclass(frozen=True)
class EnsembleRow:
    """One line of a table: a method with its options.

    Attributes:
        method: Name of the method.
        options: Of the method.
        published: By the name of the column that it stands in.
    """

    method: str
    options: Options = field(default_factory=dict)
    published: Mapping[str, Published] = field(default_factory=dict)


@dataclass(frozen=True)
class EnsembleReproduction:
    """A table of ensembles: what runs, what was published, and how the two settings differ.

    Attributes:
        name: On the command line.
        summary: One line.
        data: Name of the data set.
        data_options: Of the data set.
        network: Name of the network.
        network_options: Of the network.
        fit: Options of training.
        num_members: How many members each ensemble has.
        seeds: How many.
        rows: In the order of the table.
        quick: What ``--quick`` changes: options of data and of training, and under ``rows`` those of methods by name.
        images: Where the images come from, for whoever has none.
        notes: A sentence for each thing that differs from the published settings, or that one must know.
    """

    name: str
    summary: str
    data: str
    data_options: Options
    network: str
    network_options: Options
    fit: Options
    num_members: int
    seeds: int
    rows: tuple[EnsembleRow, ...]
    quick: Options
    images: str
    notes: tuple[str, ...] = ()

    @property
    def options(self) -> str:
        """The builder of the stream whose images it is."""
        return streams.BUILDERS[STREAMS[self.data]]

    def run(self, given: Mapping[str, Any], rest: Sequence[str]) -> tuple[EnsembleTable, Path]:
        """Run what has no record yet and write ``table.md`` and the report beside the records.

        Args:
            given: ``quick``, ``seeds``, ``out``, ``device`` and ``force`` from the command line, None where not given.
            rest: The other arguments, options of data and training.

        Raises:
            InputError: Something given cannot be used, or there are no images.
        """
        from lifelong_ens.store import write_bytes

        plan = self.plan(given, rest)
        with telling("root" in plan.data_options, self.images):
            plan.run()
        table = EnsembleTable.of(self, plan.out, plan.cells[0][0].setting)
        write_bytes(plan.out / "table.md", table.markdown().encode())
        return table, plan.out

    def dry_run(self, given: Mapping[str, Any], rest: Sequence[str]) -> str:
        """See ``experiments.ensembles.dry_run.dry_run``."""
        from experiments.ensembles.dry_run import dry_run

        plan = self.plan(given, rest)
        with telling("root" in plan.data_options, self.images):
            return dry_run(plan)

    def plan(self, given: Mapping[str, Any], rest: Sequence[str]) -> EnsemblePlan:
        """What ``run`` runs."""
        from experiments.ensembles.plan import plan_rows

        quick = bool(given.get("quick"))
        out = given.get("out") or Path("results") / f"{self.name}{'-quick' if quick else ''}"
        return plan_rows(self.quickened() if quick else self, given, rest, Path(out))

    def table_of(self, folder: Path) -> EnsembleTable:
        """The table of the newest runs whose records are in ``folder``."""
        return EnsembleTable.of(self, folder)

    def quickened(self) -> EnsembleReproduction:
        """The same table with fewer images, epochs or candidates, and one seed."""
        changed: Mapping[str, Options] = self.quick.get("rows", {})
        rows = tuple(
            dataclasses.replace(row, options={**row.options, **changed.get(row.method, {})})
            for row in self.rows
        )
        return dataclasses.replace(
            self,
            rows=rows,
            seeds=1,
            fit={**self.fit, **self.quick.get("fit", {})},
            data_options={**self.data_options, **self.quick.get("data", {})},
        )


@contextmanager
def telling(known: bool, images: str) -> Iterator[None]:
    """Where it is not known where images lie, a refusal inside also says where they come from."""
    try:
        yield
    except InputError as error:
        if known:
            raise
        raise InputError(f"{error}; {images}.") from error


@dataclass(frozen=True, eq=False)
class EnsembleTable:
    """The finished table of one setting.

    Attributes:
        reproduction: What was declared.
        headline: Our numbers as people read them, one row per method.
        labels: The declared row of each.
        fit: How the networks were trained.
        about: Of the data, as a record says it.
        seeds: How many.
    """

    reproduction: EnsembleReproduction
    headline: Any
    labels: Mapping[str, EnsembleRow | None]
    fit: Options
    about: Options
    seeds: int

    @classmethod
    def of(
        cls, reproduction: EnsembleReproduction, folder: Path, setting: str | None = None
    ) -> EnsembleTable:
        """The table of the runs in one setting, that of the newest run if not given."""
        from lifelong_ens.report.ensemble_records import load_ensemble_records
        from lifelong_ens.report.ensembles import EnsembleReport

        records = load_ensemble_records(folder)
        chosen = setting or records[-1]["setting"]
        records = [record for record in records if record["setting"] == chosen]
        order = [row.method for row in reproduction.rows]
        records.sort(
            key=lambda record: (
                order.index(record["method"]["name"]) if record["method"]["name"] in order else 99
            )
        )
        report = EnsembleReport.from_records(records)
        labels = {
            label: _declared(reproduction, record)
            for label, record in zip(report.runs["method"], records, strict=True)
        }
        seeds = len({record["seed"] for record in records})
        return cls(reproduction, report.headline(), labels, records[0]["fit"], records[0]["data"], seeds)

    def markdown(self) -> str:
        """The whole of ``table.md``."""
        title = f"# {self.reproduction.name}: {self.reproduction.summary}"
        notes = "\n".join(f"* {note}" for note in self.reproduction.notes)
        return "\n\n".join([title, self.block(), notes]) + "\n"

    def block(self) -> str:
        """The table and its setting, without title and notes; what README shows."""
        from lifelong_ens.report.markdown import markdown_table

        table = self.headline.reset_index()
        columns = dict.fromkeys(name for row in self.reproduction.rows for name in row.published)
        for name in columns:
            rows = [self.labels[label] for label in table["method"]]
            table[f"published: {name}"] = [str(row.published.get(name, "–")) if row else "–" for row in rows]
        other = [
            f"{name} is {self.fit[name]}, declared {value}"
            for name, value in self.reproduction.fit.items()
            if self.fit.get(name) != value
        ]
        limit = (self.about.get("options") or {}).get("limit")
        if limit != self.reproduction.data_options.get("limit"):
            other.append(f"{limit} images per class")
        warning = f"**Not at full settings:** {', '.join(other)}. " if other else ""
        setting = (
            f"{self.reproduction.network} on {self.about['name']}: {self.about['num_train']} training images, "
            f"{self.about['num_test']} test images, {self.fit['epochs']} epochs, "
            f"{self.seeds} seed{'s' if self.seeds > 1 else ''}."
        )
        return f"{markdown_table(table)}\n\n{warning}{setting} Published: accuracy / NLL / ECE."


def _declared(reproduction: EnsembleReproduction, record: Mapping[str, Any]) -> EnsembleRow | None:
    """The declared row that a record is of; its options may be smaller ones."""
    rows = [row for row in reproduction.rows if row.method == record["method"]["name"]]
    options = record["method"].get("options") or {}
    exact = [row for row in rows if set(row.options.items()) <= set(options.items())]
    return (exact or rows or [None])[-1]
