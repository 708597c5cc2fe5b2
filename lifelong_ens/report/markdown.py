"""``summary.md``: the headline table, what it says, and what the runs ran on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pandas as pd

_NOTES = """\
* mean ± standard deviation over seeds; no ± where all seeds gave the same number or there was one seed.
* **accuracy**: mean over all tasks after the last one.
* **forgetting**: mean over past tasks of the best earlier accuracy minus the final one. A bare 0 is exactly
  zero for every seed; a negative number says that past tasks got better.
* **parameters**, **on disk**: all that is stored after the last task.
* **forward FLOPs/image**: the path of the task trained last; 1 multiply-add is 2 FLOPs.
* **training FLOPs**, **training time**: of the whole stream.
* **(1.10x)**: the ratio to the vanilla network, `finetune`, of the same stream, setting and seed, if it ran.
* **–**: not defined or not measured, as the forgetting of one task or of `joint`, which trains all at once.
"""


def summary_markdown(
    headline: pd.DataFrame,
    significance: pd.DataFrame,
    runs: pd.DataFrame,
    columns: pd.DataFrame,
    plots: Iterable[str],
) -> str:
    """The whole of ``summary.md``, from the tables of a report and the file names of its plots."""
    parts = ["# Summary", _tables(headline), _NOTES.rstrip()]
    parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots]
    parts += ["## How sure", _significance(significance)]
    tuned: Any = runs.dropna(subset=["tuning"])[["stream", "strategy", "tuning"]].drop_duplicates()
    if len(tuned):
        parts += ["## Tuning", _tuning(tuned)]
    parts += ["## Runs", markdown_table(_provenance(runs)), "## Columns", _columns(columns)]
    return "\n\n".join(parts) + "\n"


def _tables(headline: pd.DataFrame) -> str:
    """One table, or one under a heading for each stream."""
    if headline.index.nlevels == 1:
        return markdown_table(headline.reset_index())
    streams = headline.index.get_level_values("stream").unique()
    return "\n\n".join(
        f"## {stream}\n\n{markdown_table(headline.loc[stream].reset_index())}" for stream in streams
    )


def _significance(table: Any) -> str:
    """Intervals and tests as percentages and points, and what they are."""
    percent = {
        "average accuracy %": [f"{100 * mean:.2f}" for mean in table["mean"]],
        "95 % interval": [
            "–" if pd.isna(low) else f"{100 * low:.2f} to {100 * high:.2f}"
            for low, high in zip(table["low"], table["high"], strict=True)
        ],
        "difference, points": [
            "–" if pd.isna(value) else f"{100 * value:+.2f}" for value in table["difference"]
        ],
        "p": ["–" if pd.isna(value) else f"{value:.3g}" for value in table["p_value"]],
    }
    shown = table[["stream", "strategy", "seeds"]].assign(**percent, note=table["note"])
    baselines = table.loc[table["note"] == "the baseline", "strategy"].unique()
    against = f"to `{baselines[0]}`" if len(baselines) else "to the baseline"
    notes = (
        "Student's interval for the mean over seeds; a two-sided paired t-test over the seeds that both have run, of "
        f"the difference {against}, not corrected for the number of strategies."
    )
    return f"{markdown_table(shown)}\n\n{notes}"


def _tuning(tuned: pd.DataFrame) -> str:
    """A sentence for every strategy whose options were chosen by trials."""
    rows = zip(tuned["stream"], tuned["strategy"], tuned["tuning"], strict=True)
    return "\n".join(f"* `{strategy}` on {stream}: {words}." for stream, strategy, words in rows)


def _provenance(runs: pd.DataFrame) -> pd.DataFrame:
    """Where the runs ran: one row for each different setting, device, commit and set of versions."""
    versions = [name for name in runs.columns if name.startswith("version_")]
    keys = ["stream", "setting", "num_tasks", "network", "device", "commit", *versions]
    known = runs[keys].astype(object).where(runs[keys].notna(), "–")
    places: Any = known.assign(runs=1).groupby(keys, sort=False, as_index=False)["runs"].sum()
    return places.rename(columns={name: name.removeprefix("version_") for name in versions})


def _columns(columns: pd.DataFrame) -> str:
    """The documented columns, one list per table."""
    lists = []
    for table, group in columns.groupby("table", sort=False):
        rows = zip(group["name"], group["unit"], group["meaning"], strict=True)
        items = [f"* `{name}`{f' ({unit})' if unit else ''}: {meaning}" for name, unit, meaning in rows]
        lists.append(f"### {table}.csv\n\n" + "\n".join(items))
    return "\n\n".join(lists)


def html_table(table: pd.DataFrame) -> str:
    """The same for a notebook."""
    return table.to_html(index=False, border=0)


def latex_table(table: pd.DataFrame) -> str:
    r"""The same for LaTeX, in the style of booktabs; ``±``, ``–`` and the ``x`` of ratios as LaTeX writes them."""
    align = "l" + "r" * (table.shape[1] - 1)
    text = table.astype(str).to_latex(index=False, escape=True, column_format=align)
    text = re.sub(r"(?<=\d)x\)", r"$\\times$)", text)
    return text.replace("±", r"$\pm$").replace("–", "--")


def markdown_table(table: pd.DataFrame) -> str:
    """A GitHub table of strings, the first column to the left and the others to the right."""
    from tabulate import tabulate

    rows = table.astype(str).to_numpy().tolist()
    align = ("left", *["right"] * (table.shape[1] - 1))
    return tabulate(
        rows, headers=list(table.columns), tablefmt="github", disable_numparse=True, colalign=align
    )
