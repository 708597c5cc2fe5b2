"""``lifelong-ens export``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.commands.shared import refuse

HELP = "tasks of a finished run as a folder that answers without Avalanche"
EXAMPLES = """
examples:
  lifelong-ens export results/demo --strategy batch_ensemble --out model
  lifelong-ens export results/demo --strategy packnet --seed 2 --out model --tasks 1,3
  lifelong-ens export results/demo/records/split_digits-packnet-0-1a2b3c4d.json --out model"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Write what all tasks share once, and a small file for every task. Into a folder that holds tasks "
        "of the same shared part, tasks are added; those of the same names are replaced."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "run_of", type=Path, metavar="OUT", help="folder of compare, or one OUT/records/NAME.json in it"
    )
    parser.add_argument("--strategy", help="whose run, where the folder has several")
    parser.add_argument("--seed", type=int, help="of the run (default: the lowest there is)")
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL", help="the folder")
    parser.add_argument(
        "--tasks", help="names or numbers (from 1) of tasks, joined by commas (default: all tasks)"
    )


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """Write the folder and say what to do with it."""
    refuse(rest)
    from experiments.export import export_record, find_record

    record = find_record(parsed.run_of, parsed.strategy, parsed.seed)
    store = export_record(record, parsed.out, parsed.tasks)
    print(store.summary())
    print(f"next: lifelong-ens predict {parsed.out} IMAGES --task '{store.names()[0]}'")
