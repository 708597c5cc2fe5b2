"""``lifelong-ens doctor``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from experiments.commands.shared import refuse

HELP = "check that everything that is needed is installed and in place"
EXAMPLES = """
examples:
  lifelong-ens doctor
  lifelong-ens doctor --root ~/data"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Check versions, whether torch and torchvision fit together, the device, where files are written and which "
        "streams find their images. A line each: ok, missing or wrong, and what to do. The exit code is 1 if "
        "something is missing or wrong that is needed; extras and images are not, unless --root names a folder."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder that images are looked for in (default: $LIFELONG_ENS_DATA, or data)",
    )


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """Print a line for every check; the exit code is 1 if something that is needed is not there."""
    refuse(rest)
    from experiments.doctor import checks

    root = parsed.root or Path(os.environ.get("LIFELONG_ENS_DATA", "data"))
    failed = 0
    for check in checks(root.expanduser(), asked=parsed.root is not None):
        print(check.line(), flush=True)
        failed += check.needed and check.status != "ok"
    print(f"\n{failed} to mend" if failed else "\nall that is needed is there")
    return int(failed > 0)
