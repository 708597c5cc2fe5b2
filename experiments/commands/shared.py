"""What several commands have in common."""

from __future__ import annotations

import argparse
import shutil
import sys
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


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Where runs go on at once."""
    group = parser.add_argument_group("several runs at once")
    group.add_argument(
        "--jobs", metavar="N", help="processes of this machine with a thread each; auto for as many as cores"
    )
    group.add_argument(
        "--engine", metavar="NAME", help="local (as --jobs) or ray (default: one run after the other)"
    )
    group.add_argument(
        "--ray_address",
        metavar="ADDRESS",
        help="auto, or HOST[:PORT] of the head (default: a cluster found here)",
    )
    group.add_argument(
        "--resources", metavar="LIST", help="of each run, such as cpus=2,gpus=0.25 (default: cpus=1)"
    )


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
    print_table(report.headline().reset_index())
    print(f"\nrecords, tables and plots: {out}\npage: {page or out / 'report.html'}")


def print_table(table: Any) -> None:
    """Print a pandas table of texts, its cells in several lines where a terminal is too narrow for it."""
    from tabulate import tabulate

    text = tabulate(table, headers="keys", tablefmt="simple", showindex=False, disable_numparse=True)
    width = max(map(len, text.splitlines()))
    if not sys.stdout.isatty() or width <= shutil.get_terminal_size().columns:
        print(text)
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    folded = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    for number, name in enumerate(table.columns):
        folded.add_column(name, overflow="fold", no_wrap=number == 0)
    for row in table.itertuples(index=False):
        folded.add_row(*(str(cell).replace(" (", "\n(") for cell in row))
    Console(highlight=False, markup=False).print(folded)


def refuse_devices(command: str, rest: Sequence[str]) -> None:
    """Of commands that run on one device.

    Raises:
        InputError: Several were asked for, or several processes have been started.
    """
    from lifelong_ens.training.joining import started

    outside = started()
    if outside is not None:
        raise InputError(
            f"{command} runs on one device: start it without {outside.by}; compare runs on several."
        )
    if any(word.partition("=")[0] == "--devices" for word in rest):
        raise InputError(f"{command} runs on one device: leave --devices out; compare runs on several.")


def refuse(rest: Sequence[str]) -> None:
    """Of commands that take no options by name.

    Raises:
        InputError: Something was left over.
    """
    if rest:
        raise InputError(f"did not expect {' '.join(rest)!r}; see --help.")
