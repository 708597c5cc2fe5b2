"""The command line, ``lifelong-ens COMMAND``; nothing heavy is imported before it is known what is asked for."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from experiments.commands import bench, compare, ensemble, export, listing, predict, report, reproduce, tune
from lifelong_ens.errors import InputError, NonFiniteLossError

COMMANDS = {
    "compare": compare,
    "tune": tune,
    "ensemble": ensemble,
    "reproduce": reproduce,
    "report": report,
    "export": export,
    "predict": predict,
    "list": listing,
    "bench": bench,
}
EXAMPLES = """
examples:
  lifelong-ens compare --stream split_digits --strategies finetune,batch_ensemble,pnn --seeds 3 --out results/d
  lifelong-ens report results/d
  lifelong-ens list batch_ensemble

exit codes:
  0 done   2 input that cannot be used, said in one line   130 stopped by Ctrl-C; the same command goes on
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for input that cannot be used, 130 when interrupted."""
    parsed, rest = _parser().parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("matplotlib", "PIL", "avalanche"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return parsed.run(parsed, rest) or 0
    except (InputError, NonFiniteLossError) as error:
        return _fail(str(error), parsed.debug)
    except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}; what was finished before is kept", parsed.debug)
    except KeyboardInterrupt:
        print("lifelong-ens: stopped; the same command goes on after what is finished", file=sys.stderr)
        return 130


def _fail(message: str, debug: bool) -> int:
    if debug:
        logging.getLogger(__name__).exception("the error was raised here:")
    print(f"lifelong-ens: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lifelong-ens",
        description="Lifelong learning and efficient ensembles, with what they cost.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
