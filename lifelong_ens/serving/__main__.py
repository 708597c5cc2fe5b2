"""``python -m lifelong_ens.serving predict``: needs torch, safetensors, numpy and Pillow alone."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lifelong_ens.errors import InputError
from lifelong_ens.serving import predict


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m lifelong_ens.serving", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    predict.add_arguments(commands.add_parser("predict", help=predict.HELP, allow_abbrev=False))
    try:
        predict.run(parser.parse_args(arguments))
    except InputError as error:
        return _fail(" ".join(str(error).split()))
    except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    return 0


def _fail(message: str) -> int:
    print(f"lifelong-ens: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
