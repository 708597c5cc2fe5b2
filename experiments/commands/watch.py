"""``lifelong-ens watch``."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Sequence
from pathlib import Path

from experiments.commands.shared import refuse

HELP = "look at runs that another process is at"
EXAMPLES = """
examples:
  lifelong-ens watch results/d            # until all are finished, or Ctrl-C
  lifelong-ens watch results/d --once     # how it stands now, for scripts"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Show how far the runs of a folder are, which this or another machine writes to. A run whose process is "
        "gone, or has written nothing for a minute, is shown as stopped. It ends when no run is left that could "
        "still finish; Ctrl-C ends it too, with exit code 0, and does nothing to the runs."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of compare, ensemble or reproduce")
    parser.add_argument("--once", action="store_true", help="print how it stands and end")


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """Draw until all is done."""
    refuse(rest)
    # nothing has to be kept: Ctrl-C just ends it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        from experiments.watching import watch

        watch(parsed.out, once=parsed.once)
