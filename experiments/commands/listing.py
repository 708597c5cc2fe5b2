"""``lifelong-ens list``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from experiments import catalogue, reproduce
from experiments.commands.reproduce import lines_of_all
from experiments.commands.shared import refuse
from lifelong_ens.errors import InputError, nearest

HELP = "streams, strategies, methods and networks; with a name, its options"
EXAMPLES = """
examples:
  lifelong-ens list strategies
  lifelong-ens list batch_ensemble
  lifelong-ens list training"""
_PLURALS = {"streams": "stream", "strategies": "strategy", "methods": "method", "networks": "network"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "name", nargs="?", help="streams, strategies, methods, networks, reproductions, training, or one name"
    )


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print what can be named, or the options of what is named."""
    refuse(rest)
    name = parsed.name
    if name in (None, *_PLURALS):
        for plural, kind in _PLURALS.items():
            if name in (None, plural):
                print("\n".join([f"{plural}:", *_lines_of(kind)]))
    elif name == "reproductions":
        print("\n".join(lines_of_all()))
    elif name == "training":
        print("\n".join(catalogue.option_lines(catalogue.FIT)))
    else:
        print("\n".join(_described(name)))


def _lines_of(kind: str) -> list[str]:
    entries = catalogue.KINDS[kind].items()
    return [f"  {name:22} {catalogue.describe(target).summary}" for name, target in entries]


def _described(name: str) -> list[str]:
    """What has that name, with its options; a strategy and a way of making ensembles may have the same."""
    lines = []
    for kind, builders in catalogue.KINDS.items():
        if name in builders:
            lines += [f"{name} ({kind}): {catalogue.describe(builders[name]).summary}"]
            lines += catalogue.option_lines(builders[name])
    if name in reproduce.NAMES:
        declared = reproduce.find(name)
        lines += [f"{name} (reproduction): {declared.summary}", *catalogue.option_lines(declared.options)]
    if not lines:
        ours = [one for builders in catalogue.KINDS.values() for one in builders]
        known = [*_PLURALS, *reproduce.NAMES, "reproductions", "training", *ours]
        raise InputError(f"nothing is called {name!r}; {nearest(name, known)}")
    return lines
