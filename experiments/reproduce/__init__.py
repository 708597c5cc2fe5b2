"""Tables of papers and questions of our own, declared in one module each; importing this loads no torch."""

from __future__ import annotations

from importlib import import_module

from experiments.reproduce.declaration import Declared
from lifelong_ens.errors import InputError, nearest

# the name on the command line is the name of the module
NAMES = (
    "be_cost_table",
    "split_cifar100_resnet18",
    "split_tiny_imagenet",
    "structured_memory",
    "gap_to_independent",
    "ensembles_cifar",
    "ensemble_orderings",
    "translation",
)


def find(name: str) -> Declared:
    """The reproduction of that name.

    Raises:
        InputError: There is none.
    """
    if name not in NAMES:
        raise InputError(f"unknown reproduction {name!r}; {nearest(name, NAMES)}")
    return import_module(f"experiments.reproduce.{name}").REPRODUCTION
