"""``lifelong-ens reproduce``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments import reproduce
from experiments.commands.shared import (
    add_device,
    add_dry_run,
    add_engine,
    add_force,
    add_seeds,
    refuse,
    refuse_devices,
)

HELP = "a declared table: published numbers beside ours"
EXAMPLES = """
examples:
  lifelong-ens reproduce be_cost_table --root data --dry_run
  lifelong-ens reproduce be_cost_table --root data --quick
  lifelong-ens reproduce split_cifar100_resnet18 --root data --epochs 5 --limit 50"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.epilog = _epilog()
    parser.add_argument("name", nargs="?", help="which; all are named if it is not given")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer epochs, images or trials, and one seed; the table says which",
    )
    add_seeds(parser, default="as declared")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for records and tables (default: results/NAME, or results/NAME-quick)",
    )
    add_device(parser)
    add_force(parser)
    add_engine(parser)
    add_dry_run(parser)


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """Run what has no record yet and print the table, or the plan; without a name, name all of them."""
    refuse_devices("reproduce", rest)
    if parsed.name is None:
        refuse(rest)
        print("\n".join(lines_of_all()))
        return
    if parsed.dry_run:
        print(reproduce.find(parsed.name).dry_run(vars(parsed), rest))
        return
    table, out = reproduce.find(parsed.name).run(vars(parsed), rest)
    print(f"{table.markdown()}\nrecords and tables: {out}")


def lines_of_all() -> list[str]:
    """A line for every reproduction."""
    return [f"  {name:24} {reproduce.find(name).summary}" for name in reproduce.NAMES]


def _epilog() -> str:
    lines = ["reproductions:", *lines_of_all(), ""]
    lines += [
        "Its options (lifelong-ens list NAME) and those of training are given by name: --root DIR --epochs 3."
    ]
    return "\n".join([*lines, EXAMPLES])
