"""What several commands have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lifelong_ens.errors import InputError


def add_config(parser: argparse.ArgumentParser) -> None:
    """The file that any option of a command may stand in."""
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="a file with any of these options by name"
    )


def add_seeds(parser: argparse.ArgumentParser, default: str = "1") -> None:
    """The seeds of the runs."""
    parser.add_argument("--seeds", help=f"how many seeds, or a list such as 0,3,7 (default: {default})")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where torch computes."""
    parser.add_argument("--device", help="auto, cpu, cuda or mps (default: auto)")


def add_force(parser: argparse.ArgumentParser) -> None:
    """Of commands that keep what was run."""
    parser.add_argument(
        "--force", action="store_true", default=None, help="repeat runs whose records are there"
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Of commands that can say what they are going to do."""
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print what would be run and what it would cost; nothing is written",
    )


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """What ``compare`` and ``tune`` are about."""
    add_config(parser)
    parser.add_argument("--stream", help="name of the stream, or module:function (default: split_digits)")
    parser.add_argument(
        "--strategies", help="names or module:function, joined by commas (default: finetune,batch_ensemble)"
    )
    parser.add_argument(
        "--network",
        help="name of the network, or module:function (default: mlp for digits and MNIST kinds, else lenet5)",
    )
    add_seeds(parser)
    add_device(parser)


def show(report: Any, out: Path, page: Path | None = None) -> None:
    """Print a report's headline, and where the rest of it is."""
    from tabulate import tabulate

    print(tabulate(report.headline(), headers="keys", tablefmt="simple", disable_numparse=True))
    print(f"\nrecords, tables and plots: {out}\npage: {page or out / 'report.html'}")


def refuse(rest: Sequence[str]) -> None:
    """Of commands that take no options by name.

    Raises:
        InputError: Something was left over.
    """
    if rest:
        raise InputError(f"did not expect {' '.join(rest)!r}; see --help.")
