"""A script by which a shell completes commands, options and names; nothing of the library runs while it does."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import shtab

from experiments.catalogue import FIT, KINDS, Option, describe, filled
from experiments.ensembles import STREAMS
from experiments.machines import MACHINES
from experiments.reproduce import NAMES, find

DEVICES = ("auto", "cpu", "cuda", "mps")
STREAM, NETWORK, STRATEGY, METHOD = (KINDS[kind] for kind in ("stream", "network", "strategy", "method"))
# what belongs behind an option, by its name
VALUES: Mapping[str, Sequence[str]] = {
    "stream": [*STREAM],
    "network": [*NETWORK],
    "data": [*STREAMS],
    "device": DEVICES,
    "machine": [*MACHINES],
    "task_inference": ("none", "entropy", "max_probability"),
    "infer_task": ("entropy", "max_probability"),
    "evaluate": ("new", "all"),
}
# and where names are joined by commas
LISTS: Mapping[str, Sequence[str]] = {"strategies": [*STRATEGY], "methods": [*METHOD]}
# whose options a command takes beside its own
OWNERS: Mapping[str, Sequence[Mapping[str, str]]] = {
    "compare": (STREAM, NETWORK, STRATEGY),
    "plan": (NETWORK, STRATEGY),
    "tune": (STREAM, NETWORK, STRATEGY),
    "ensemble": ({name: STREAM[name] for name in STREAMS.values()}, NETWORK, METHOD),
    "reproduce": ({name: find(name).options for name in NAMES},),
}


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for ``bash`` or ``zsh``.

    Args:
        parser: Of the command line; it is changed, so that it is of no more use for parsing.
        shell: Which.
    """
    (commands,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        for action in command._actions:
            _describe(name, action)
        _add_options(name, command)
    lists = _bash_lists() if shell == "bash" else _zsh_lists()
    return shtab.complete(parser, shell, preamble=lists)


def _describe(command: str, action: argparse.Action) -> None:
    """Say what an argument takes."""
    # what a word of help ends with would end the word in a script
    if action.help:
        action.help = action.help.replace("`", "'")
    if action.dest in LISTS:
        action.complete = {shell: _function(action.dest) for shell in ("bash", "zsh")}  # pyright: ignore
    elif action.dest in VALUES:
        action.choices = VALUES[action.dest]
    elif command == "list" and action.dest == "name":
        plurals = ("streams", "strategies", "methods", "networks", "reproductions", "training")
        action.choices = [
            *dict.fromkeys([*plurals, *NAMES, *(name for kind in KINDS.values() for name in kind)])
        ]
    elif command == "reproduce" and action.dest == "name":
        action.choices = NAMES
    elif action.type is Path:
        folder = action.dest in ("out", "outs", "root", "model", "cifar_c")
        action.complete = shtab.DIRECTORY if folder else shtab.FILE  # pyright: ignore


def _add_options(name: str, command: argparse.ArgumentParser) -> None:
    """Add what the command line leaves to streams, networks, methods and training: see ``experiments.options``."""
    known = {text for action in command._actions for text in action.option_strings}
    targets = [target for owner in OWNERS.get(name, ()) for target in owner.values()]
    for option in _options([*targets, FIT] if targets else []):
        text = f"--{option.name}"
        if text in known:
            continue
        known.add(text)
        action = command.add_argument(text, help=re.split(r"[.:;`]", option.help)[0])
        choices = _choices(option)
        if choices:
            action.choices = choices
        if "Path" in option.type:
            action.complete = shtab.FILE  # pyright: ignore


def _options(targets: Sequence[str]) -> Iterator[Option]:
    for target in targets:
        options = describe(target).options
        taken = filled([option.name for option in options])
        yield from (option for option in options if option.name not in taken)


def _choices(option: Option) -> list[str]:
    """The values of a literal or a truth; none for anything else."""
    if option.type == "bool":
        return ["true", "false"]
    return re.findall(r"'([^']*)'", option.type) if "Literal[" in option.type else []


def _function(name: str) -> str:
    return f"_lifelong_ens_{name}"


def _bash_lists() -> str:
    """Functions that complete what stands behind the last comma of a word."""
    lines = []
    for name, values in LISTS.items():
        words = " ".join(values)
        lines += [
            f"{_function(name)}() {{",
            '  local last="${1##*,}"',
            f'  compgen -P "${{1%"$last"}}" -W "{words}" -- "$last"',
            "}",
        ]
    return "\n".join(lines)


def _zsh_lists() -> str:
    lines = []
    for name, values in LISTS.items():
        lines += [f"{_function(name)}() {{", f"  _sequence compadd - {' '.join(values)}", "}"]
    return "\n".join(lines)
