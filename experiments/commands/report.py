"""``lifelong-ens report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.commands.shared import refuse, show
from lifelong_ens.errors import InputError, nearest

HELP = "make tables, plots and the page report.html of folders of records again"
EXAMPLES = """
examples:
  lifelong-ens report results/demo
  lifelong-ens report results/demo results/mine --page both.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Make the tables and plots of a folder again, and report.html: one file that shows all of it and "
        "opens from disk, without a network. Of several folders only the page is made, which compares them."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("outs", type=Path, nargs="+", metavar="OUT", help="folders of compare or ensemble")
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="where the page goes (default: OUT/report.html; here for several OUT)",
    )
    parser.add_argument(
        "--baseline", default="finetune", help="what summary.md tests against (default: finetune)"
    )


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """Write the tables, plots and the page of one folder, or the page of several."""
    refuse(rest)
    from lifelong_ens.report import Report
    from lifelong_ens.report.ensemble_records import holds_ensembles
    from lifelong_ens.report.page import write_page

    page = write_page(parsed.outs, parsed.page)
    out = parsed.outs[0]
    if len(parsed.outs) > 1 or not any((out / "records").glob("*.json")):
        print(f"page: {page}")
        return
    if holds_ensembles(out):
        from lifelong_ens.report.ensembles import EnsembleReport

        ensembles = EnsembleReport.load(out)
        ensembles.write(out)
        show(ensembles, out, page)
        return
    report = Report.load(out)
    known = report.runs["strategy"].unique()
    if parsed.baseline != "finetune" and parsed.baseline not in known:
        raise InputError(f"--baseline {parsed.baseline} did not run; {nearest(parsed.baseline, known)}")
    report.write(out, parsed.baseline)
    show(report, out, page)
