"""The table of measured rows: ``bench.csv`` for programs, ``table.md`` for people."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.bench import ROWS
from lifelong_ens.report.headline import quantity
from lifelong_ens.report.markdown import markdown_table
from lifelong_ens.store import write_bytes

CSV, MARKDOWN = "bench.csv", "table.md"
COLUMNS = (
    "row",
    "case",
    "ours",
    "against",
    "goal",
    "ratio",
    "quartile_1",
    "quartile_3",
    "verdict",
    "ours_median",
    "against_median",
    "unit",
    "rounds",
    "quick",
    "device",
    "versions",
    "measured",
)
_TITLE = "# bench: speed and memory beside named peers"
_HOW = """\
The ratio is the median over rounds (and its quartiles) of ours / against where the goal is at most something, and of
against / ours, times as fast or as small, where it is at least something; relative to the FLOPs of both in the row
`structured`. In each round all contestants of a case take turns, on one thread, by CPU time on a CPU. Beside each
name stands its median for one call. *absent*: the peer is not installed; *broken*: it fails at this work, and how."""


@dataclass(frozen=True, eq=False)
class Table:
    """Measured lines, one for every goal.

    Attributes:
        lines: With the columns ``COLUMNS``.
    """

    lines: pd.DataFrame

    @classmethod
    def empty(cls) -> Table:
        """No lines yet."""
        return cls(pd.DataFrame(columns=list(COLUMNS)))

    @classmethod
    def load(cls, folder: Path) -> Table:
        """What a folder holds."""
        return cls(pd.read_csv(folder / CSV))

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a folder holds one."""
        return (folder / CSV).is_file()

    def with_rows(self, measured: pd.DataFrame) -> Table:
        """The table with these lines in the place of those of the same rows on the same devices."""
        new = set(zip(measured["row"], measured["device"], strict=True))
        pairs = zip(self.lines["row"], self.lines["device"], strict=True)
        kept = self.lines[[pair not in new for pair in pairs]]
        lines = pd.concat([kept, measured]) if len(kept) else measured
        place = [list(ROWS).index(row) for row in lines["row"]]
        lines = lines.assign(place=place).sort_values(["place", "device"], kind="stable")
        return Table(lines.reindex(columns=list(COLUMNS)).reset_index(drop=True))

    def write(self, folder: Path) -> None:
        """Write both files."""
        write_bytes(folder / CSV, self.lines.to_csv(index=False).encode())
        write_bytes(folder / MARKDOWN, self.markdown().encode())

    def markdown(self) -> str:
        """The whole of ``table.md``."""
        return f"{_TITLE}\n\n{self.block()}\n"

    def block(self) -> str:
        """The table, what it means and where it was measured; what README shows."""
        return "\n\n".join([markdown_table(self.strings()), _HOW, self._where()])

    def strings(self) -> pd.DataFrame:
        """The cells as people read them; the device only where there are several."""
        rows: list[Any] = [row for _, row in self.lines.iterrows()]
        columns = {
            "row": [row["row"] for row in rows],
            "case": [row["case"] for row in rows],
            "ours": [_contestant(row, "ours") for row in rows],
            "against": [_contestant(row, "against") for row in rows],
            "goal": [row["goal"] for row in rows],
            "ratio": [_ratio(row) for row in rows],
            "verdict": [row["verdict"] for row in rows],
        }
        if len(set(self.lines["device"])) > 1:
            columns["device"] = [str(row["device"]).partition(" ")[0] for row in rows]
        return pd.DataFrame(columns)

    def _where(self) -> str:
        """How many goals are reached, on what devices and versions, and what is only a quick look."""
        kinds = [str(verdict).partition(" ")[0] for verdict in self.lines["verdict"]]
        counts = ", ".join(
            f"{kinds.count(kind)} {kind}"
            for kind in ("reached", "missed", "absent", "broken")
            if kind in kinds
        )
        quick = sorted(set(self.lines.loc[self.lines["quick"].astype(bool), "row"]), key=list(ROWS).index)
        warning = f"**Quick, few rounds:** {', '.join(quick)}. " if quick else ""
        devices, versions = ("; ".join(self.lines[name].unique()) for name in ("device", "versions"))
        return f"{warning}{counts}. {devices}; {versions}; rounds: {_range(list(self.lines['rounds']))}."


def _contestant(row: Any, which: str) -> str:
    median, name = float(row[f"{which}_median"]), row[which]
    if math.isnan(median):
        return name
    return f"{name}: {_seconds(median) if row['unit'] == 's' else quantity([median], 'B')}"


def _seconds(value: float) -> str:
    """Three digits in seconds, milliseconds or microseconds."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def _ratio(row: Any) -> str:
    if math.isnan(row["ratio"]):
        return "–"
    low, median, high = (
        f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
        for value in (row["quartile_1"], row["ratio"], row["quartile_3"])
    )
    return median if low == high else f"{median} ({low} to {high})"


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
