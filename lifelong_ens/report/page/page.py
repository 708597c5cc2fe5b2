"""Folders of records -> one HTML file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from lifelong_ens.errors import InputError
from lifelong_ens.report.ensemble_records import check_ensemble_record, holds_ensembles
from lifelong_ens.report.page import ensembles, lifelong
from lifelong_ens.report.page.shared import Source, other_states
from lifelong_ens.report.records import check_record, scan_records
from lifelong_ens.report.unfinished import find_unfinished
from lifelong_ens.store import write_bytes

NAME = "report.html"


def write_page(outs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of one or more folders that ``compare`` or ``ensemble`` wrote; returns its path.

    Args:
        outs: The folders; of several, runs of one setting are compared, and where two have the same run, each is
            named by its folder.
        path: Of the page; ``report.html`` in the folder, or here where there are several.

    Raises:
        InputError: A folder has neither records nor runs that were begun, or strategies meet ensembles.
    """
    target = Path(path) if path is not None else Path(outs[0] if len(outs) == 1 else ".") / NAME
    write_bytes(target, render(outs).encode())
    return target


def render(outs: Sequence[str | os.PathLike[str]]) -> str:
    """The page as text, see ``write_page``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    kinds = {holds_ensembles(out) for out in outs}
    if len(kinds) > 1:
        raise InputError(
            "strategies and ensembles are measured in different ways; make a page for each of them"
        )
    (of_ensembles,) = kinds
    sources = [read_source(out, of_ensembles) for out in outs]
    if not any(source.records or source.unfinished or source.damaged for source in sources):
        command = f"lifelong-ens compare --out {outs[0]}"
        raise InputError(f"no records in {Path(outs[0]) / 'records'}; run `{command}` first")
    builder = ensembles if of_ensembles else lifelong
    found = builder.comparisons(sources) if any(source.records for source in sources) else []
    settings = {record["setting"] for source in sources for record in source.records}
    environment = Environment(
        loader=PackageLoader(__name__.rpartition(".")[0], "."),
        autoescape=select_autoescape(["html", "html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=", ".join(source.out.resolve().name for source in sources),
        folders=[str(source.out) for source in sources],
        comparisons=found,
        others=other_states(sources, settings),
        style=_part("page.css"),
        script=_part("page.js"),
        version=version("lifelong-ens"),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def read_source(out: str | os.PathLike[str], of_ensembles: bool) -> Source:
    """What a folder says."""
    records, damaged = scan_records(out, check_ensemble_record if of_ensembles else check_record)
    return Source(Path(out), records, find_unfinished(out), damaged)


def _part(name: str) -> str:
    return (files(__name__.rpartition(".")[0]) / name).read_text(encoding="utf-8")
