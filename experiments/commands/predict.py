"""``lifelong-ens predict``: as ``python -m lifelong_ens.serving predict``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from experiments.commands.shared import refuse
from lifelong_ens.serving import predict

HELP = predict.HELP
EXAMPLES = """
examples:
  lifelong-ens predict model photos/ --task 'task 1' --out answers.csv
  lifelong-ens predict model a.png b.jpg --infer_task entropy"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    predict.add_arguments(parser)
    parser.epilog = EXAMPLES


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """Answer and print, or write the file."""
    refuse(rest)
    predict.run(parsed)
