"""Claims about the order of methods, held against runs with several seeds on several data sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streams
from experiments.ensembles import STREAMS
from experiments.ensembles.reproduction import EnsembleReproduction, telling

if TYPE_CHECKING:
    from experiments.ensembles.plan import EnsemblePlan


@dataclass(frozen=True)
class Claim:
    """That a method has a lower NLL than another, or is best or second of all where ``than`` is None.

    Attributes:
        method: The one that is said to be better.
        than: The one that it is better than.
        words: The claim.
        source: Who makes it.
    """

    method: str
    than: str | None
    words: str
    source: str


@dataclass(frozen=True)
class Orderings:
    """Claims on several data sets.

    Attributes:
        name: On the command line.
        summary: One line.
        parts: What runs on each data set; their records share a folder.
        claims: What is held against them.
        images: Where the images come from, for whoever has none.
    """

    name: str
    summary: str
    parts: tuple[EnsembleReproduction, ...]
    claims: tuple[Claim, ...]
    images: str

    @property
    def options(self) -> str:
        """The builder of the stream whose images the last part uses."""
        return streams.BUILDERS[STREAMS[self.parts[-1].data]]

    def run(self, given: Mapping[str, Any], rest: Sequence[str]) -> tuple[OrderingsTable, Path]:
        """Run what has no record yet and write ``table.md`` beside the records; see ``EnsembleReproduction.run``."""
        from lifelong_ens.store import write_bytes

        plans = self._plans(given, rest)
        with telling(_names_root(rest), self.images):
            for plan in plans:
                plan.run()
        out = plans[0].out
        table = self.table_of(out)
        write_bytes(out / "table.md", table.markdown().encode())
        return table, out

    def dry_run(self, given: Mapping[str, Any], rest: Sequence[str]) -> str:
        """See ``experiments.ensembles.dry_run.dry_run``: one data set after the other."""
        from experiments.ensembles.dry_run import dry_run

        plans = self._plans(given, rest)
        with telling(_names_root(rest), self.images):
            return "\n\n".join(dry_run(plan) for plan in plans)

    def _plans(self, given: Mapping[str, Any], rest: Sequence[str]) -> list[EnsemblePlan]:
        return [part.plan(given, _for(part, rest)) for part in self.parts]

    def table_of(self, folder: Path) -> OrderingsTable:
        """The table of the newest runs on each data set whose records are in ``folder``."""
        from lifelong_ens.report.ensemble_records import load_ensemble_records
        from lifelong_ens.report.ensembles import EnsembleReport

        records = load_ensemble_records(folder)
        newest = {record["data"]["name"]: record["setting"] for record in records}
        records = [record for record in records if newest[record["data"]["name"]] == record["setting"]]
        return OrderingsTable(self, EnsembleReport.from_records(records).runs, records)


def _names_root(rest: Sequence[str]) -> bool:
    return any(argument.startswith("--root") for argument in rest)


def _for(part: EnsembleReproduction, rest: Sequence[str]) -> list[str]:
    """The arguments without ``--root`` for a data set that has none."""
    if part.data != "digits":
        return list(rest)
    kept, skip = [], False
    for argument in rest:
        is_root = argument == "--root" or argument.startswith("--root=")
        if not (skip or is_root):
            kept.append(argument)
        skip = argument == "--root"
    return kept


@dataclass(frozen=True, eq=False)
class OrderingsTable:
    """The finished table.

    Attributes:
        orderings: What was declared.
        runs: The table ``runs`` of the report.
        records: What it was made from.
    """

    orderings: Orderings
    runs: Any
    records: Sequence[Mapping[str, Any]]

    def markdown(self) -> str:
        """The whole of ``table.md``."""
        return f"# {self.orderings.name}: {self.orderings.summary}\n\n{self.block()}\n\n{self._nlls()}\n"

    def block(self) -> str:
        """One row for each claim, one column for each data set; what README shows."""
        import pandas as pd

        from lifelong_ens.report.markdown import markdown_table

        names = list(dict.fromkeys(self.runs["data"]))
        rows = [
            {
                "claim": claim.words,
                "source": claim.source,
                **{name: self._verdict(claim, self.runs[self.runs["data"] == name]) for name in names},
            }
            for claim in self.orderings.claims
        ]
        settings = []
        for name in names:
            one = next(record for record in self.records if record["data"]["name"] == name)
            seeds = len({record["seed"] for record in self.records if record["data"]["name"] == name})
            settings.append(
                f"{name}: {one['network']['name']}, {one['data']['num_train']} training images, "
                f"{one['fit']['epochs']} epochs, {one['asked_members']} members, {seeds} seed{'s' if seeds > 1 else ''}"
            )
        words = (
            "Mean difference in NLL (nats, below 0: the claim holds) with the p of a paired t-test over seeds, or the "
            f"place among all methods. {'; '.join(settings)}."
        )
        return f"{markdown_table(pd.DataFrame(rows))}\n\n{words}"

    def _verdict(self, claim: Claim, runs: Any) -> str:
        nll = runs.pivot_table(index="seed", columns="method", values="nll")
        if claim.method not in nll or (claim.than is not None and claim.than not in nll):
            return "–"
        if claim.than is None:
            places = nll.mean().rank()
            place = int(places[claim.method])
            return f"{'yes' if place <= 2 else 'no'}: {place} of {len(places)}"
        pairs = nll[[claim.method, claim.than]].dropna()
        difference = pairs[claim.method] - pairs[claim.than]
        mean = float(difference.mean())
        return f"{'yes' if mean <= 0 else 'no'}: {mean:+.3f}{_p_value(difference)}"

    def _nlls(self) -> str:
        """All NLLs, for whoever wants another claim."""
        from lifelong_ens.report.markdown import markdown_table

        table = self.runs.pivot_table(index="method", columns="data", values="nll", sort=False)
        shown = table.map(lambda value: "–" if math.isnan(value) else f"{value:.3f}")
        return f"Mean NLL on test images:\n\n{markdown_table(shown.reset_index())}"


def _p_value(difference: Any) -> str:
    from scipy import stats

    if len(difference) < 2 or float(difference.std()) == 0.0:
        return ""
    test: Any = stats.ttest_1samp(difference, 0.0)
    return f" (p {float(test.pvalue):.2g})"
