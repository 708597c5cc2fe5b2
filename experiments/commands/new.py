"""``lifelong-ens new``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.commands.shared import refuse

HELP = "files to start a strategy of your own from, with its test"
EXAMPLES = """
examples:
  lifelong-ens new strategy my_method
  lifelong-ens new strategy my_method --out methods"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Write NAME.py, a small method that runs as it is and is explained where it is to be changed, and "
        "test_NAME.py, which asks of it what every strategy must do. Nothing is overwritten."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("kind", choices=["strategy"], help="what to start: a strategy")
    parser.add_argument(
        "name", metavar="NAME", help="of the module and of the function in it, such as my_method"
    )
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="the folder (default: here)")


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """Write the files and say what to do with them."""
    refuse(rest)
    from experiments.scaffold import write_strategy

    method, test = write_strategy(parsed.name, parsed.out.expanduser())
    print(f"{method}: the method\n{test}: its test")
    go = "" if method.parent == Path() else f"cd {method.parent} && "
    print(f"next: {go}lifelong-ens compare --strategies {parsed.name}:{parsed.name},finetune")
    print(f"      {go}python -m pytest {test.name}    (pip install pytest)")
