"""What can be named on the command line, and its options, read from source without importing anything heavy."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lifelong_ens.ensembles
import lifelong_ens.networks
import strategies
import streams
from lifelong_ens.errors import InputError, nearest

KINDS: dict[str, dict[str, str]] = {
    "stream": {name: target for name, target in streams.BUILDERS.items() if name != "from_arrays"},
    "strategy": strategies.BUILDERS,
    "network": lifelong_ens.networks.BUILDERS,
    "method": lifelong_ens.ensembles.METHODS,
}
# arguments that the run itself fills in
FILLED = frozenset({"body", "fit", "seed", "device", "plugins", "num_classes", "input_shape"})
# those of a function that makes an ensemble; to a stream, ``validation`` is an option
FILLED_METHOD = FILLED | {"build_network", "train", "validation", "num_members", "progress", "each"}
FIT = "lifelong_ens.training.fit:Fit"


@dataclass(frozen=True)
class Option:
    """One argument of a builder, as text: the name on the command line, its type, default and meaning."""

    name: str
    type: str
    default: str | None
    help: str


@dataclass(frozen=True)
class Entry:
    """A builder as its source describes it."""

    summary: str
    options: tuple[Option, ...]


def target_of(kind: str, name: str) -> str:
    """Where a named builder is, ``package.module:function``.

    Args:
        kind: ``stream``, ``strategy``, ``network`` or ``method``.
        name: A name of ours, or ``package.module:function`` for anybody's own.

    Raises:
        InputError: There is none of that name.
    """
    if ":" in name:
        return name
    if name not in KINDS[kind]:
        raise InputError(
            f"unknown {kind} {name!r}; {nearest(name, KINDS[kind])}, or give your own as module:function"
        )
    return KINDS[kind][name]


def load(target: str) -> Callable[..., Any]:
    """Import ``package.module:function``; the working folder is searched as ``python -m`` would.

    Raises:
        InputError: There is no such module, or no such function in it.
    """
    module_name, _, attribute = target.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise InputError(
            f"no module {module_name!r} to take {target!r} from; it is looked for in {here} too."
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise InputError(f"{module_name} has no {attribute!r}; {nearest(attribute, names)}") from error


def filled(arguments: Collection[str]) -> frozenset[str]:
    """Those of a function's arguments that the run itself fills in."""
    return FILLED_METHOD if "build_network" in arguments else FILLED


@functools.cache
def describe(target: str) -> Entry:
    """Summary and options of one of our builders, or of ``Fit``, from its source."""
    module, _, name = target.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(f"no module {module!r}.")
    tree = ast.parse(Path(spec.origin).read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            doc = ast.get_docstring(node) or ""
            pairs = _fields(node) if isinstance(node, ast.ClassDef) else _arguments(node)
            meanings = _meanings(doc)
            options = tuple(
                Option(argument, kind, default, meanings.get(argument, ""))
                for argument, kind, default in pairs
                if argument not in filled([name for name, *_ in pairs])
            )
            return Entry(doc.partition("\n")[0], options)
    raise InputError(f"{module} has no {name!r}.")


def option_lines(target: str) -> list[str]:
    """The options of one of our builders as the command line shows them."""
    lines = []
    for option in describe(target).options:
        default = "" if option.default in (None, "None") else f" (default: {option.default})"
        text = f"{option.help}{default}".replace("``", "")
        lines.append(f"  --{option.name} {_values(option.type)}".rstrip())
        lines += [f"      {line}" for line in textwrap.wrap(text, 76)]
    return lines


def _values(annotation: str) -> str:
    """A type as a hint: choices for a literal, nothing for a name that only the source explains."""
    if annotation.startswith("Literal["):
        return "|".join(re.findall(r"'([^']*)'", annotation))
    return "" if annotation[:1].isupper() else annotation


def _arguments(node: ast.FunctionDef) -> list[tuple[str, str, str | None]]:
    positional = node.args.args
    missing = [None] * (len(positional) - len(node.args.defaults))
    pairs = [*zip(positional, [*missing, *node.args.defaults], strict=True)]
    pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return [
        (
            argument.arg,
            ast.unparse(argument.annotation) if argument.annotation else "",
            default and ast.unparse(default),
        )
        for argument, default in pairs
    ]


def _fields(node: ast.ClassDef) -> list[tuple[str, str, str | None]]:
    return [
        (line.target.id, ast.unparse(line.annotation), line.value and ast.unparse(line.value))
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    ]


def _meanings(doc: str) -> dict[str, str]:
    """The ``Args`` or ``Attributes`` section of a docstring, argument to text."""
    section = re.search(r"^(?:Args|Attributes):\n((?:[ \t]+.*\n?|\n)+)", doc, flags=re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"^ {4}(\w+): ", section[1], flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}
