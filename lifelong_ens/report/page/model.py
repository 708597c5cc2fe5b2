"""What a page shows, before it is HTML: facts, tables and figures of one or more comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lifelong_ens.report.drawing import COLOURS, styles_of

_SIGNS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖"}


@dataclass(frozen=True)
class Series:
    """A strategy or method of a comparison: its number there, name, style in plots, and the sign of its marker."""

    index: int
    name: str
    style: Mapping[str, Any]

    @property
    def group(self) -> str:
        """What its parts of a plot are drawn with as gid."""
        return f"series-{self.index}"

    @property
    def colour(self) -> str:
        """Its custom property."""
        i = COLOURS.index(self.style["color"])
        return "ink" if i == len(COLOURS) - 1 else f"s{i}"

    @property
    def sign(self) -> str:
        """A character like its marker."""
        return _SIGNS[self.style["marker"]]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what it says, smaller what goes with it, what it sorts by, whether it is clearly best."""

    text: str
    detail: str = ""
    sort: float | str | None = None
    best: bool = False


@dataclass(frozen=True)
class Head:
    """The head of a column: its name, what it means, and which direction is better (``up``, ``down`` or neither)."""

    label: str
    meaning: str = ""
    better: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table; its head is a series or a text."""

    head: Series | str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Table:
    """A table whose columns sort; the first head is that of the rows."""

    caption: str
    heads: Sequence[Head]
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture, what it shows in words for those who do not see it, and its caption; of one series, or of all."""

    svg: str
    alt: str
    caption: str
    series: Series | None = None


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    colour: str
    label: str


@dataclass(frozen=True)
class Block:
    """A part of a comparison under a heading of its own."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    small: bool = False
    tables: Sequence[Table] = ()
    keys: Sequence[Key] = ()
    missing: str = ""


@dataclass(frozen=True)
class Sample:
    """A strip of images as a data URI, its size in pixels, and what they are."""

    uri: str
    width: int
    height: int
    title: str
    text: str


@dataclass(frozen=True)
class State:
    """A run that is not finished, or a file that cannot be read."""

    label: str
    state: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Runs that may be compared: one stream or data set in one setting."""

    title: str
    lead: str
    noun: str
    series: Sequence[Series]
    facts: Sequence[tuple[str, str]]
    samples: Sequence[Sample]
    samples_note: str
    blocks: Sequence[Block]
    commands: Sequence[str]
    commands_note: str
    unfinished: Sequence[State] = field(default_factory=list)


def series_of(names: Sequence[str]) -> dict[str, Series]:
    """Each name with its number and style, in the order in which they come."""
    styles = styles_of(names)
    return {name: Series(i, name, styles[name]) for i, name in enumerate(dict.fromkeys(names))}
