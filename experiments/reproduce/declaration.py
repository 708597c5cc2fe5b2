"""What a reproduction declares: data only, so that a row, a published number or a difference is one line.

The command line knows a reproduction by what ``Declared`` has: a name, a summary, and how it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import streams

Options = Mapping[str, Any]


class Shown(Protocol):
    """A finished table."""

    def markdown(self) -> str:
        """The whole of ``table.md``."""
        ...

    def block(self) -> str:
        """The table and its setting, without title and notes; what README shows."""
        ...


class Declared(Protocol):
    """Any reproduction; what it runs with is imported when it runs."""

    @property
    def name(self) -> str:
        """On the command line, and of its module."""
        ...

    @property
    def summary(self) -> str:
        """One line."""
        ...

    @property
    def options(self) -> str:
        """Whose options it takes beside those of training, ``module:name``."""
        ...

    def run(self, given: Mapping[str, Any], rest: Sequence[str]) -> tuple[Shown, Path]:
        """Run what has no record yet and write tables beside the records.

        Args:
            given: ``quick``, ``seeds``, ``out``, ``device`` and ``force`` from the command line, None where not given.
            rest: The other arguments, options by name.

        Returns:
            The table, and the folder that it was written to.

        Raises:
            InputError: Something given cannot be used.
        """
        ...

    def dry_run(self, given: Mapping[str, Any], rest: Sequence[str]) -> str:
        """What ``run`` would run, and what that would cost; nothing is written.

        Raises:
            InputError: Something given cannot be used, or this one cannot tell.
        """
        ...

    def table_of(self, folder: Path) -> Shown:
        """The table of the newest runs whose records are in ``folder``."""
        ...


@dataclass(frozen=True)
class Row:
    """One line of a table: a strategy with its options.

    Attributes:
        label: What the table calls it.
        strategy: Name of the builder.
        options: Of the builder.
        network: Options of the network that this row has on top of the reproduction's, such as a width.
        memory: The published memory, relative to the vanilla network.
        computation: The published computation, relative to the vanilla network.
    """

    label: str
    strategy: str
    options: Options = field(default_factory=dict)
    network: Options = field(default_factory=dict)
    memory: float | None = None
    computation: float | None = None

    def recorded_options(self) -> dict[str, Any]:
        """The options as they stand in a record, those of the network as ``network.<option>``."""
        return {**self.options, **{f"network.{name}": value for name, value in self.network.items()}}


@dataclass(frozen=True)
class Quick:
    """What ``--quick`` changes.

    Attributes:
        fit: Options of training.
        stream: Options of the stream.
        strategies: Options of strategies by the strategy's name.
        seeds: How many.
    """

    fit: Options = field(default_factory=dict)
    stream: Options = field(default_factory=dict)
    strategies: Mapping[str, Options] = field(default_factory=dict)
    seeds: int = 1


@dataclass(frozen=True)
class Reproduction:
    """A table of strategies over a stream: what runs, what was published, and how the two settings differ.

    Attributes:
        name: On the command line.
        summary: One line.
        stream: Name of the stream.
        stream_options: Of the stream.
        network: Name of the network.
        network_options: Of the network.
        fit: Options of training.
        seeds: How many.
        rows: In the order of the table; the one of ``finetune`` is the vanilla network of all ratios.
        quick: What ``--quick`` changes.
        source: Where the published numbers stand; empty where there are none.
        notes: A sentence for each thing that differs from the published setting, or that one must know.
        reference: Label of the row that accuracies are compared with; None for no such column.
        after_tasks: Numbers of tasks after which memory is shown, in place of accuracy and computation.
        images: Where the images come from, for whoever has none.
    """

    name: str
    summary: str
    stream: str
    stream_options: Options
    network: str
    network_options: Options
    fit: Options
    seeds: int
    rows: tuple[Row, ...]
    quick: Quick
    images: str
    source: str = ""
    notes: tuple[str, ...] = ()
    reference: str | None = None
    after_tasks: tuple[int, ...] = ()

    @property
    def options(self) -> str:
        """The stream's builder."""
        return streams.BUILDERS[self.stream]

    def run(self, given: Mapping[str, Any], rest: Sequence[str]) -> tuple[Shown, Path]:
        """See ``experiments.reproduce.running.reproduce``."""
        from experiments.reproduce.running import reproduce

        return reproduce(self, given, rest)

    def dry_run(self, given: Mapping[str, Any], rest: Sequence[str]) -> str:
        """See ``experiments.dry_run.dry_run``."""
        from experiments.dry_run import dry_run
        from experiments.reproduce.running import plan_reproduction

        return dry_run(plan_reproduction(self, given, rest))

    def table_of(self, folder: Path) -> Shown:
        """The table of the newest runs whose records are in ``folder``."""
        from experiments.reproduce.table import Table
        from lifelong_ens.report.records import load_records

        return Table.of(self, load_records(folder))

    def quickened(self) -> Reproduction:
        """The same table with fewer epochs, images, seeds or trials."""
        rows = tuple(
            dataclasses.replace(row, options={**row.options, **self.quick.strategies.get(row.strategy, {})})
            for row in self.rows
        )
        return dataclasses.replace(
            self,
            rows=rows,
            fit={**self.fit, **self.quick.fit},
            stream_options={**self.stream_options, **self.quick.stream},
            seeds=self.quick.seeds,
        )
