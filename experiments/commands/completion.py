"""``lifelong-ens completion``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from experiments.commands.shared import refuse

HELP = "a script by which a shell completes commands, options and names"
EXAMPLES = """
examples:
  lifelong-ens completion bash > ~/.local/share/bash-completion/completions/lifelong-ens
  lifelong-ens completion zsh > ~/.zfunc/_lifelong-ens    # with fpath+=~/.zfunc before compinit in .zshrc"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Print a script that completes commands, options, and names of streams, strategies, methods, networks "
        "and reproductions, in lists joined by commas too. It is as new as the library it was printed by."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("shell", choices=["bash", "zsh"], help="for which shell")


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the script."""
    refuse(rest)
    from experiments.cli import make_parser
    from experiments.completion import script

    print(script(make_parser(), parsed.shell))
